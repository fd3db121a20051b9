"""A weight push as the controller sees it: the learner sends, every generator receives, digests are compared.

    connect: learner and generators meet, unless they have met already; engines may be at work
    offer:   the learner is about to train and the generators cannot take weights yet: they may until it changes them
    start:   pause the engines -> tell the generators to receive, the learner to send
    arrived: every generator holds the version, verified; generation may continue
    report:  the learner's account of it, when it has time to give one

Until the learner is told to send nothing has moved, and a failure costs only the generators that caused it. One that
comes later leaves parts of two versions: all generators stay at version -1, paused, until the next push, which connects
anew to those that are still alive.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict

from megatron_async_rlhf.clock import now
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import (
    AsyncRLHFError,
    GeneratorError,
    GeneratorGoneError,
    GeneratorSilentError,
    LearnerError,
    MismatchError,
    TransferError,
)
from megatron_async_rlhf.generator.protocol import Pause, Receiver
from megatron_async_rlhf.learner.protocol import (
    BeginPush,
    FinishPush,
    JoinTransfer,
    Learner,
    PushWeights,
)
from megatron_async_rlhf.models.layout import LearnerLayout
from megatron_async_rlhf.types import PushReport, Span
from megatron_async_rlhf.weights.blame import root_cause

# After the learner knows that a push has ended, generators hear of it at once unless they are dead.
_GRACE_S = 5.0


class PushError(TransferError):
    """A push that failed, mostly because of generators that have to be left out of the next.

    Attributes:
        gone: what each of them said last; nobody if all are alive, as after a network that was gone for too long.
        moved: whether weights were under way, so that no generator holds a whole version.
    """

    def __init__(self, message: str, *, gone: dict[Receiver, GeneratorGoneError], moved: bool) -> None:
        super().__init__(message)
        self.gone, self.moved = gone, moved


class WeightSync:
    """Pushes version after version, one push at a time, to the generators that it is told: the pool knows who is alive."""

    def __init__(
        self,
        learner: Learner,
        config: RunConfig,
        address: tuple[str, int],
        clock: Callable[[], float] = now,
    ) -> None:
        self._clock = clock
        self._learner = learner
        self._config = config
        self._host, self._port = address
        self._sessions = 0
        self._met: list[Receiver] = []  # over the connection that there is; empty without one
        self._is_verified = False  # the connection, by a push over it
        self._receiving: asyncio.Task | None = None
        self._span: Span | None = None
        self._account: tuple[PushReport, list[Span]] | None = None  # the learner's, if it came before it was asked for

    async def connect(self, receivers: Sequence[Receiver], newcomers: Sequence[Receiver] = ()) -> None:
        """Let all that the next push goes to meet the learner, unless they have met already.

        Args:
            newcomers: those of them that have come back. Each meets the learner alone first: while all meet, the others
                compute nothing, so nobody may take part who cannot come.

        Raises:
            PushError: somebody did not come, or they cannot meet although each of them can meet the learner.
            GeneratorError: there are none.
        """
        if not receivers:
            raise GeneratorError("no generator is alive to receive weights; see their logs")
        if self.is_connected(receivers):
            return
        for newcomer in newcomers:
            await self._meet_alone(newcomer)
        if self.is_connected(receivers):
            return
        try:
            await self._meet(receivers)
        except PushError:
            raise
        except (TransferError, GeneratorError) as error:
            for receiver in receivers:  # everybody accuses somebody: find out who cannot
                await self._meet_alone(receiver)
            if not self.is_connected(receivers):
                raise PushError(str(error), gone={}, moved=False) from None

    def is_connected(self, receivers: Sequence[Receiver]) -> bool:
        """Whether a push to exactly these can start at once."""
        return list(receivers) == self._met

    async def offer(self, version: int) -> None:
        """Let a push to all that are connected be started while the learner trains."""
        await self._learner.execute(PushWeights(version=version, verify=self._verifies, offered=True))

    async def start(
        self,
        version: int,
        receivers: Sequence[Receiver],
        *,
        offered: bool = False,
        how: Pause = "keep",
        recompute: bool = True,
        on_paused: Callable[[], None] = lambda: None,
    ) -> bool:
        """Begin to bring these generators, which are connected, to `version`. Then await `arrived`.

        Returns false if it is too late for one that was offered: the engines are paused, and that is all.

        Args:
            offered: see `offer`.
            how: what becomes of requests under way.
            recompute: the generators empty their caches, those of frozen requests too, which older weights made.
            on_paused: called once no engine computes any more.

        Raises:
            PushError: an engine cannot be paused; the others are.
            LearnerError: the learner could not be told.
        """
        verify, started = self._verifies, self._clock()
        self._check(await _from_each(receivers, lambda receiver: receiver.pause(how, clear_cache=False)))
        on_paused()
        self._account = None
        if offered and not (await self._learner.execute(BeginPush(version=version))).begun:
            return False
        # Created before the learner is told, so that the requests leave while its answer is awaited. With the answer the
        # controller prepares the next rollout for training, and the paused engines would wait for that, too.
        self._receiving = asyncio.create_task(self._receive(receivers, version, verify, recompute, started))
        if not offered:
            try:
                await self._learner.execute(PushWeights(version=version, verify=verify))
            except BaseException:  # nothing will come, or nobody is left to await it
                self._receiving.cancel()
                await asyncio.gather(self._receiving, return_exceptions=True)
                raise
        return True

    @property
    def _verifies(self) -> bool:
        verify = self._config.weights.verify
        return verify == "every" or (verify == "first" and not self._is_verified)

    def disconnect(self) -> None:
        """Meet anew before the next push: one of the generators is another process now."""
        self._met = []

    async def arrived(self) -> None:
        """Return when every generator holds the version, verified if that was asked for; the engines stay paused.

        Raises:
            MismatchError: a generator holds other bytes than the learner.
            PushError: the push failed otherwise; says where first. There is no report then.
        """
        assert self._receiving is not None  # `start` began it
        await self._receiving

    async def report(self) -> tuple[PushReport, list[Span]]:
        """What the push moved and proved, and its spans, the whole first. Waits for commands the learner got earlier."""
        span = self._span
        assert span is not None  # it has arrived
        report, spans = self._account or await self._finish()
        self._is_verified = True
        return report, [span, *spans]

    async def push(self, version: int, receivers: Sequence[Receiver]) -> tuple[PushReport, list[Span]]:
        """All four in one; once more if nobody is to blame: a push can be lost in the network, or a wait with it."""
        try:
            return await self._push(version, receivers)
        except PushError as error:
            if error.gone:
                raise
            return await self._push(version, receivers)

    async def _push(self, version: int, receivers: Sequence[Receiver]) -> tuple[PushReport, list[Span]]:
        await self.connect(receivers)
        await self.start(version, receivers)
        await self.arrived()
        return await self.report()

    async def _receive(
        self, receivers: Sequence[Receiver], version: int, verify: bool, recompute: bool, started: float
    ) -> None:
        tasks = {
            asyncio.create_task(receiver.receive_weights(version=version, verify=verify, recompute=recompute)): receiver
            for receiver in receivers
        }
        try:
            await self._all_done(tasks)
        except LearnerError:  # nobody is left to say more
            raise
        except AsyncRLHFError as error:
            raise await self._failure(version, error, tasks) from None
        finally:
            for task in tasks:  # those that have not ended wait in vain
                task.cancel()
            self._span = Span(
                name=f"push {version}",
                start=started,
                end=self._clock(),
                process="weights",
                args={"version": version},
            )

    async def _finish(self) -> tuple[PushReport, list[Span]]:
        """The learner's account of a push, once it has sent everything."""
        answer = await self._learner.execute(FinishPush())
        assert answer.push is not None  # else it would have raised
        return answer.push, answer.spans

    async def _all_done(self, tasks: dict[asyncio.Task, Receiver]) -> None:
        """Raises what the first that failed raised."""
        limit = self._config.weights.timeout_s
        for attempt in range(2):
            done, pending = await asyncio.wait(tasks, timeout=limit, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
            if not pending:
                return
            if attempt == 0:
                # A long push, or a generator that hangs: the learner can tell, because it would have waited in vain.
                self._account = await self._finish()
        names = ", ".join(tasks[task].name for task in pending)
        raise TransferError(f"{names} did not confirm the weights within {limit:g} s after all had been sent")

    async def _failure(self, version: int, first: AsyncRLHFError, tasks: dict[asyncio.Task, Receiver]) -> TransferError:
        """One error out of what everybody says."""
        self._met = []
        told: list[AsyncRLHFError] = [first]
        if self._account is None and not isinstance(first, TransferError):  # else it has given its account already
            try:
                self._account = await self._finish()
            except TransferError as error:
                told.append(error)
        if self._account is not None and self._account[0].mismatches:
            return _mismatch(version, self._account[0])
        done, pending = await asyncio.wait(tasks, timeout=_GRACE_S)
        told += [failure for task in done if isinstance(failure := task.exception(), AsyncRLHFError)]
        gone = {tasks[task]: failure for task in done if isinstance(failure := task.exception(), GeneratorGoneError)}
        for receiver in (tasks[task] for task in pending):  # they may hang, or wait for somebody who does
            gone[receiver] = GeneratorGoneError(f"{receiver.name}: said nothing for {_GRACE_S:g} s after a failed push")
        cause = root_cause([str(error) for error in told])
        return PushError(f"push of version {version} failed: {cause}", gone=gone, moved=True)

    async def _meet_alone(self, receiver: Receiver) -> None:
        """Whatever goes wrong is its fault.

        Raises:
            PushError: it cannot meet the learner.
        """
        began = self._clock()
        try:
            await self._meet([receiver])
        except PushError:
            raise
        except (TransferError, GeneratorError) as error:
            why = GeneratorSilentError(
                f"{receiver.name}: it cannot meet the learner: {error}", silent_s=self._clock() - began
            )
            raise PushError(str(why), gone={receiver: why}, moved=False) from None

    async def _meet(self, receivers: Sequence[Receiver]) -> None:
        """Rendezvous of all learner ranks and the workers of these generators."""
        self._met = []
        self._check(await _from_each(receivers, lambda receiver: receiver.probe()))  # or the others would wait in vain
        config, names = self._config, [receiver.name for receiver in receivers]
        session = f"session-{self._sessions}"
        self._sessions += 1
        info = {
            "host": self._host,
            "port": self._port,
            "session": session,
            "generators": names,
            "learner": asdict(LearnerLayout.of(config.learner)),
            "dtype": config.generator.dtype,
            "staging_bytes": config.weights.staging_bytes,
            "transport": config.weights.transport,
            "timeout_s": config.weights.timeout_s,
        }
        command = JoinTransfer(host=self._host, port=self._port, session=session, generators=names)
        # Longer than the members themselves wait, so that they get to say who was missing.
        limit = 2 * config.weights.timeout_s + _GRACE_S
        joins = (r.join_transfer(info | {"replica": i}, timeout_s=limit) for i, r in enumerate(receivers))
        learner, *results = await asyncio.gather(self._learner.execute(command), *joins, return_exceptions=True)
        self._check(dict(zip(receivers, results, strict=True)), learner)
        self._met, self._is_verified = list(receivers), False

    def _check(self, results: Mapping[Receiver, object], learner: object = None) -> None:
        """Continue only if nobody raised anything.

        Raises:
            PushError: somebody is gone.
            TransferError: what went wrong otherwise, by the account closest to the cause.
        """
        errors = [error for error in (learner, *results.values()) if isinstance(error, BaseException)]
        for error in errors:
            if not isinstance(error, TransferError | GeneratorError):
                raise error
        if not errors:
            return
        gone = {receiver: error for receiver, error in results.items() if isinstance(error, GeneratorGoneError)}
        self._met = []
        cause = root_cause([str(error) for error in errors])
        raise PushError(cause, gone=gone, moved=False) if gone else TransferError(cause)


async def _from_each(
    receivers: Sequence[Receiver], call: Callable[[Receiver], Awaitable[None]]
) -> dict[Receiver, BaseException | None]:
    """What each of them raised, if anything."""
    results = await asyncio.gather(*(call(receiver) for receiver in receivers), return_exceptions=True)
    return dict(zip(receivers, results, strict=True))


def _mismatch(version: int, report: PushReport) -> MismatchError:
    return MismatchError(
        f"push of version {version}: {len(report.mismatches)} of {report.compared} digests differ, first "
        f"{report.mismatches[0]}; that generator does not hold the learner's weights",
        compared=report.compared,
        mismatches=report.mismatches,
    )
