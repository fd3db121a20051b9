"""A weight push as the controller sees it: the learner sends, every generator receives, digests are compared.

    start:   connect if need be -> pause the engines -> tell the learner to send, the generators to receive
    arrived: every generator holds the version, verified; generation may go on
    report:  the learner's account of it, when it has time to give one

A push that fails leaves generators with parts of two versions: they stay at version -1, paused, until the next push,
which connects anew to those that are still alive.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import (
    AsyncRLHFError,
    GeneratorError,
    GeneratorGoneError,
    MismatchError,
    TransferError,
)
from megatron_async_rlhf.generator.protocol import Pause
from megatron_async_rlhf.learner.protocol import (
    Answer,
    FinishPush,
    JoinTransfer,
    Learner,
    PushWeights,
)
from megatron_async_rlhf.types import PushReport, Span
from megatron_async_rlhf.weights.blame import root_cause
from megatron_async_rlhf.weights.layout import LearnerLayout

# After the learner knows that a push has ended, generators hear of it at once unless they are dead.
_GRACE_S = 5.0


class Receiver(Protocol):
    """A generator as a receiver of weights; raises GeneratorError."""

    name: str

    async def is_ready(self) -> bool: ...

    async def pause(self, how: Pause = "keep") -> None: ...

    async def join_transfer(self, info: dict[str, Any], *, timeout_s: float) -> None: ...

    async def receive_weights(self, *, version: int, verify: bool, recompute: bool = True) -> None: ...


class WeightSync:
    """Pushes version after version; one push at a time.

    Attributes:
        receivers: the generators still taking part.
    """

    def __init__(
        self,
        learner: Learner,
        receivers: Sequence[Receiver],
        config: RunConfig,
        address: tuple[str, int],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._clock = clock
        self.receivers = list(receivers)
        self._learner = learner
        self._config = config
        self._host, self._port = address
        self._sessions = 0
        self._pushes = 0  # over this connection: a generator that was started again has proven nothing
        self._connected = False
        self._receiving: asyncio.Task | None = None
        self._span: Span | None = None
        self._answer: Answer | None = None  # of FinishPush, if it came before it was asked for

    async def start(
        self,
        version: int,
        receivers: Sequence[Receiver] | None = None,
        *,
        how: Pause = "keep",
        recompute: bool = True,
        on_paused: Callable[[], None] = lambda: None,
    ) -> None:
        """Begin to bring every generator to `version`. Then await `arrived`.

        Args:
            receivers: the generators that are to have it; None: the same as before.
            how: what becomes of requests under way.
            recompute: the generators empty their caches, those of frozen requests too, which older weights made.
            on_paused: called once no engine computes any more.

        Raises:
            TransferError: nobody could be reached, or not all members met.
        """
        weights = self._config.weights
        started = self._clock()
        if receivers is not None and list(receivers) != self.receivers:
            self.receivers, self._connected = list(receivers), False
        if not self._connected:
            await self._connect()
            self._pushes = 0
        verify = weights.verify == "every" or (weights.verify == "first" and self._pushes == 0)
        await self._pause(how)
        on_paused()
        self._answer = None
        await self._learner.execute(PushWeights(version=version, verify=verify))
        self._receiving = asyncio.create_task(self._receive(version, verify, recompute, started))

    def disconnect(self) -> None:
        """Meet anew before the next push: one of the generators is another process now."""
        self._connected = False

    async def arrived(self) -> None:
        """Return when every generator holds the version, verified if that was asked for; the engines stay paused.

        Raises:
            MismatchError: a generator holds other bytes than the learner.
            TransferError: the push failed otherwise; says where first. There is no report then.
        """
        await self._receiving

    async def report(self) -> tuple[PushReport, list[Span]]:
        """What the push moved and proved, and its spans, the whole first. Waits for commands the learner got earlier."""
        span = self._span
        answer = self._answer or await self._learner.execute(FinishPush())
        self._pushes += 1
        return answer.push, [span, *answer.spans]

    async def push(self, version: int) -> tuple[PushReport, list[Span]]:
        """All three in one."""
        await self.start(version)
        await self.arrived()
        return await self.report()

    async def _pause(self, how: Pause) -> None:
        """Those that are gone are out.

        Raises:
            TransferError: naming them.
        """
        results = await asyncio.gather(*(receiver.pause(how) for receiver in self.receivers), return_exceptions=True)
        gone = [error for error in results if isinstance(error, GeneratorGoneError)]
        others = [error for error in results if isinstance(error, BaseException) and error not in gone]
        if others:
            raise others[0]
        if gone:
            self.receivers = [
                receiver
                for receiver, result in zip(self.receivers, results, strict=True)
                if not isinstance(result, GeneratorGoneError)
            ]
            self._connected = False
            raise TransferError("; ".join(str(error) for error in gone))

    async def _receive(self, version: int, verify: bool, recompute: bool, started: float) -> None:
        tasks = {
            asyncio.create_task(receiver.receive_weights(version=version, verify=verify, recompute=recompute)): receiver
            for receiver in self.receivers
        }
        try:
            await self._all_done(tasks)
        except AsyncRLHFError as error:
            raise await self._failure(version, error, tasks) from None
        finally:
            self._span = Span(name=f"push {version}", start=started, end=self._clock(), process="weights")

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
                self._answer = await self._learner.execute(FinishPush())
        names = ", ".join(tasks[task].name for task in pending)
        raise TransferError(f"{names} did not confirm the weights within {limit:g} s after all had been sent")

    async def _failure(self, version: int, first: AsyncRLHFError, tasks: dict[asyncio.Task, Receiver]) -> TransferError:
        """One error out of what everybody says. Afterwards nothing of this push is under way, and who is gone is out."""
        self._connected = False
        told: list[AsyncRLHFError] = [first]
        if self._answer is None and not isinstance(first, TransferError):  # else it has given its account already
            try:
                self._answer = await self._learner.execute(FinishPush())
            except TransferError as error:
                told.append(error)
        if self._answer is not None and self._answer.push.mismatches:
            return _mismatch(version, self._answer.push)
        done, pending = await asyncio.wait(tasks, timeout=_GRACE_S)
        for task in pending:
            task.cancel()
        told += [error for task in done if isinstance(error := task.exception(), AsyncRLHFError)]
        gone = {task for task in done if isinstance(task.exception(), GeneratorGoneError)} | pending
        self.receivers = [receiver for task, receiver in tasks.items() if task not in gone]
        return TransferError(f"push of version {version} failed: {root_cause([str(e) for e in told])}")

    async def _connect(self) -> None:
        """Rendezvous of all learner ranks and the workers of every generator that is alive."""
        alive = await asyncio.gather(*(receiver.is_ready() for receiver in self.receivers))
        self.receivers = [receiver for receiver, ready in zip(self.receivers, alive, strict=True) if ready]
        if not self.receivers:
            raise GeneratorError("no generator is alive to receive weights; see their logs")
        config, names = self._config, [receiver.name for receiver in self.receivers]
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
        results = await asyncio.gather(
            self._learner.execute(command),
            *(
                receiver.join_transfer(info | {"replica": i}, timeout_s=limit)
                for i, receiver in enumerate(self.receivers)
            ),
            return_exceptions=True,
        )
        errors = [error for error in results if isinstance(error, BaseException)]
        if errors:
            gone = [isinstance(result, GeneratorGoneError) for result in results[1:]]
            self.receivers = [r for r, is_gone in zip(self.receivers, gone, strict=True) if not is_gone]
            raise TransferError(root_cause([str(error) for error in errors]))
        self._connected = True


def _mismatch(version: int, report: PushReport) -> MismatchError:
    return MismatchError(
        f"push of version {version}: {len(report.mismatches)} of {report.compared} digests differ, first "
        f"{report.mismatches[0]}; that generator does not hold the learner's weights",
        compared=report.compared,
        mismatches=report.mismatches,
    )
