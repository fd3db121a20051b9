"""All generators as one: requests go to whoever has the least to do, and elsewhere when a generator dies.

    serving ──(gone)──> lost ──(answers again)──> returned ──(a push reached it)──> serving
       └──(a push failed on its way)──> stale ─────────────────(a push reached it)──> serving

Every change of standing is made here. A generator that is lost although its process may be alive is reported, so that
whoever owns the process can kill it and start another one.

Two ways to sample. `sample_together`: requests are dealt in a fixed order, queued while the engines are paused, and run
in that order, so that which sequences share a forward pass does not depend on the network. `sample`: a request goes to
the least loaded generator at once.
"""

import asyncio
import heapq
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto

import msgspec

from megatron_async_rlhf.clock import now
from megatron_async_rlhf.errors import GeneratorError, GeneratorGoneError, GeneratorSilentError
from megatron_async_rlhf.generator.protocol import Generator, Receiver, SamplingRequest
from megatron_async_rlhf.generator.seeds import request_seed
from megatron_async_rlhf.scheduler.signal import Signal
from megatron_async_rlhf.serving.returning import wait_for_return
from megatron_async_rlhf.telemetry.busy import ServersBusy
from megatron_async_rlhf.types import Completion

_MAX_LOSSES_PER_REQUEST = 9  # a request that outlives this many generators probably kills them


class Standing(Enum):
    """Of a generator in its pool."""

    SERVING = auto()
    LOST = auto()
    RETURNED = auto()  # alive, but another process than before, or one that was silent
    STALE = auto()  # alive, with parts of two versions


@dataclass
class Member:
    """One generator, the `place`-th; `load` counts the completions it is sampling."""

    generator: Generator
    place: int
    standing: Standing = Standing.SERVING
    load: int = 0


class GeneratorPool:
    """Generators that hold the same policy version between pushes.

    Sampling waits for a generator as long as it takes; `watch`, beside it, says when that is too long.

    Attributes:
        serving: those that hold it.
        returned: those that are alive again; whether they can be given weights is not known.
        on_change: awaited when that has changed.
        busy: told when each of them samples.
    """

    def __init__(
        self,
        generators: Sequence[Generator],
        *,
        max_concurrent: int,
        return_timeout_s: float,
        silence_limit_s: float,
        on_lost: Callable[[Generator, int], None] = lambda generator, samples: None,
        on_silent: Callable[[Generator, GeneratorSilentError], None] = lambda generator, error: None,
    ) -> None:
        """
        Args:
            max_concurrent: completions one generator samples at once.
            return_timeout_s: how long all of them may be lost, and how long one may take to come back.
            silence_limit_s: how long one that is lost may leave unanswered what it is asked.
            on_lost: told of every request that died with its generator: how many completions of the run it was for.
            on_silent: told of every generator whose process may be alive, but does nothing.
        """
        self.members = [Member(generator, place) for place, generator in enumerate(generators)]
        self._max_concurrent = max_concurrent
        self._return_timeout_s, self._silence_limit_s = return_timeout_s, silence_limit_s
        self._on_lost = on_lost
        self._on_silent = on_silent
        self._changed = Signal()
        self.on_change: Callable[[], Awaitable[None]] | None = None
        self.busy = ServersBusy(now, on_any=lambda span: None, on_one=lambda span: None)
        self._last_loss = "none answered"
        self._held = False  # by a push
        self._paused = False  # all engines, as a push has left them
        self._dealing = False  # by `sample_together`, while requests queue at paused engines
        self._recount()

    @property
    def alive(self) -> list[Generator]:
        """Those that can be given weights, always in the same order."""
        return [member.generator for member in self.members if member.standing is not Standing.LOST]

    @property
    def without_weights(self) -> bool:
        """Whether anybody alive waits for weights, whatever their version."""
        return len(self._serving) + len(self._lost) < len(self.members)

    @property
    def room(self) -> int:
        """Completions that could start at once."""
        return self._room

    async def sample_together(
        self,
        requests: Sequence[SamplingRequest],
        on_complete: Callable[[int, list[Completion]], None] = lambda place, completions: None,
    ) -> list[list[Completion]]:
        """Completions of every request, in order, which is the one they run in. Nothing else may be running.

        Args:
            on_complete: told of each request's completions as soon as they are there, with its place in the order.
        """
        requests = [msgspec.structs.replace(request, order=place) for place, request in enumerate(requests)]
        async with asyncio.TaskGroup() as tasks:
            self._dealing = True
            try:
                members = await self._paused_members()
                shares = [requests[i :: len(members)] for i in range(len(members))]

                async def sampled(member: Member, request: SamplingRequest) -> list[Completion]:
                    completions = await self._sample_at(member, request)
                    on_complete(request.order, completions)
                    return completions

                pending = [
                    [tasks.create_task(sampled(member, request)) for request in share]
                    for member, share in zip(members, shares, strict=True)
                ]
                queued = zip(members, map(len, shares), strict=True)
                await asyncio.gather(*(self._wait_queued(member, count) for member, count in queued))
                self._paused = False
                await self._everywhere(lambda generator: generator.resume())
            finally:
                self._dealing = False
            await self._changed.notify()
        answers = [[task.result() for task in share] for share in pending]
        return [answers[i % len(answers)][i // len(answers)] for i in range(len(requests))]

    async def sample(self, request: SamplingRequest, losses: int = 0) -> list[Completion]:
        """Completions of one request, from start to end, wherever that takes it; `losses` generators died of it."""
        if not self._is_open():
            await self._changed.wait_until(self._is_open)
        return await self._sample_at(self._least_loaded(), request, losses)

    def hold(self) -> None:
        """A push has the engines: start nothing until `release`."""
        self._held = True

    async def release(self) -> None:
        """The push is over; the engines stay paused."""
        self._held, self._paused = False, True
        await self._changed.notify()

    async def resume(self) -> None:
        """The push is over, and the engines continue."""
        await self._everywhere(lambda generator: generator.resume())
        self._held = self._paused = False
        await self._changed.notify()

    async def watch(self, on_return: Callable[[Generator], object]) -> None:
        """For ever: notice when lost generators answer again, and report those that do not come back.

        Raises:
            GeneratorError: all are lost, and none came back in time.
        """
        awaited: set[int] = set()  # places

        async def await_return(member: Member) -> None:
            try:
                if await self._is_back(member):
                    on_return(member.generator)
            finally:
                awaited.discard(member.place)

        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._fail_without_generators())
                while True:
                    await self._changed.wait_until(lambda: any(member.place not in awaited for member in self._lost))
                    for member in [member for member in self._lost if member.place not in awaited]:
                        awaited.add(member.place)
                        tasks.create_task(await_return(member))
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None

    async def _fail_without_generators(self) -> None:
        while True:
            await self._changed.wait_until(self._all_lost)
            with suppress(TimeoutError):
                async with asyncio.timeout(self._return_timeout_s):
                    await self._changed.wait_until(lambda: not self._all_lost())
            if self._all_lost():
                raise self._nobody_left()

    async def _is_back(self, member: Member) -> bool:
        """Wait until a lost generator answers, and mark it returned; False if it is in use again by then."""
        is_back = await wait_for_return(
            member.generator,
            is_lost=lambda: member.standing is Standing.LOST,
            return_timeout_s=self._return_timeout_s,
            silence_limit_s=self._silence_limit_s,
            on_silent=lambda error: self._on_silent(member.generator, error),
        )
        if is_back:
            await self._stand(Standing.RETURNED, member)
        return is_back

    async def rejoin(self, on_return: Callable[[Generator], object]) -> None:
        """Find out who of generators that another controller has left is still there; none of them holds its weights.

        One that does not answer is lost: `watch` waits for it, while the others continue.
        """

        async def ask(member: Member) -> None:
            try:
                await member.generator.probe()
            except GeneratorError as error:
                # Not reported yet, should it be silent: it may still wait for the learner that died.
                await self.mark_lost(member.generator, GeneratorGoneError(str(error)))
            else:
                await self._stand(Standing.RETURNED, member)
                on_return(member.generator)

        await asyncio.gather(*map(ask, self.members))

    async def mark_lost(self, generator: Receiver, error: GeneratorGoneError) -> None:
        """A generator does not answer any more."""
        self._last_loss = str(error)
        lost = [member for member in self.members if member.generator is generator]
        if isinstance(error, GeneratorSilentError):
            for member in lost:
                self._on_silent(member.generator, error)
        await self._stand(Standing.LOST, *lost)

    async def mark_updated(self, generators: Sequence[Receiver]) -> None:
        """These hold the newest weights; one that was lost meanwhile serves no more."""
        names = {generator.name for generator in generators}
        alive = [member for member in self.members if member.standing is not Standing.LOST]
        await self._stand(Standing.SERVING, *(member for member in alive if member.generator.name in names))

    async def mark_stale(self) -> None:
        """A push failed on its way: those that served until now hold parts of two versions."""
        await self._stand(Standing.STALE, *self._serving)

    async def _sample_at(self, member: Member, request: SamplingRequest, losses: int = 0) -> list[Completion]:
        self._add_load(member, request.samples)
        try:
            with self.busy.at(member.generator.name) as busy:
                completions = await member.generator.sample(request)
                whole = sum(not completion.interrupted for completion in completions)
                busy.done(samples=whole, tokens=_new_tokens(completions, request))
        except GeneratorGoneError as error:
            if losses == _MAX_LOSSES_PER_REQUEST:
                raise GeneratorError(
                    f"a request failed at {losses + 1} generators one after the other, which is hardly their fault; if it "
                    f"takes longer than generator.request_timeout_s, raise that: {error}"
                ) from None
            await self.mark_lost(member.generator, error)
            self._on_lost(member.generator, 0 if request.held_out else request.samples)
            completions = None
        finally:
            self._add_load(member, -request.samples)
        if completions is None:
            return await self.sample(request, losses + 1)
        if not any(completion.interrupted for completion in completions):
            return completions
        return list(await asyncio.gather(*(self._complete(c, i, request) for i, c in enumerate(completions))))

    async def _complete(self, completion: Completion, index: int, request: SamplingRequest) -> Completion:
        """Continue with one of a request's completions that was cut off, until it is whole."""
        if not completion.interrupted:
            return completion
        rest = SamplingRequest(
            prompt=request.prompt,
            samples=1,
            seed=request.seed if request.samples == 1 else request_seed(request.seed, index),
            temperature=request.temperature,
            max_new_tokens=request.max_new_tokens,
            order=request.order,
            begun=completion,
            held_out=request.held_out,
        )
        (whole,) = await self.sample(rest)
        return whole

    async def _wait_queued(self, member: Member, count: int) -> None:
        try:
            await member.generator.wait_queued(count)
        except GeneratorGoneError as error:
            if member.standing is Standing.SERVING:
                await self.mark_lost(member.generator, error)

    async def _paused_members(self) -> list[Member]:
        """Members that serve, with paused engines, once there are any. A push mostly has left them paused."""
        while True:
            await self._changed.wait_until(lambda: self._serving and not self._held)
            if not self._paused:
                await self._everywhere(lambda generator: generator.pause())
            if self._serving and not self._held:
                return self._serving

    def _is_open(self) -> bool:
        """Whether a single request may start."""
        return bool(self._serving) and not (self._held or self._dealing)

    def _all_lost(self) -> bool:
        return len(self._lost) == len(self.members)

    def _nobody_left(self) -> GeneratorError:
        names = ", ".join(member.generator.name for member in self.members)
        return GeneratorError(
            f"no generator is left ({names}) and none was back within {self._return_timeout_s:g} s, "
            f"generator.start_timeout_s; see their logs. The last one: {self._last_loss}"
        )

    async def _stand(self, standing: Standing, *members: Member) -> None:
        """So they stand from now on."""
        for member in members:
            member.standing = standing
            if standing is Standing.LOST:
                member.generator.give_up()
        self._recount()
        await self._changed.notify()
        if self.on_change is not None:
            await self.on_change()

    def _recount(self) -> None:
        """What is asked for every request, and changes only with somebody's standing."""
        of = {standing: [m for m in self.members if m.standing is standing] for standing in Standing}
        self._serving, self._lost = of[Standing.SERVING], of[Standing.LOST]
        self.serving: list[Generator] = [member.generator for member in self._serving]
        self.returned: list[Generator] = [member.generator for member in of[Standing.RETURNED]]
        self._by_load = [(member.load, member.place) for member in self._serving]
        heapq.heapify(self._by_load)
        self._room = sum(self._room_of(member) for member in self._serving)

    def _room_of(self, member: Member) -> int:
        return max(0, self._max_concurrent - member.load)

    def _add_load(self, member: Member, samples: int) -> None:
        before = self._room_of(member)
        member.load += samples
        if member.standing is Standing.SERVING:
            self._room += self._room_of(member) - before
            heapq.heappush(self._by_load, (member.load, member.place))
            if len(self._by_load) > 8 * len(self.members):
                self._recount()  # most entries are outdated

    def _least_loaded(self) -> Member:
        """Of those that serve; there are some."""
        while True:
            load, place = self._by_load[0]
            member = self.members[place]
            if member.load == load:
                return member
            heapq.heappop(self._by_load)  # outdated: there is a newer entry

    async def _everywhere(self, call: Callable[[Generator], Awaitable[None]]) -> None:
        async def one(generator: Generator) -> None:
            try:
                await call(generator)
            except GeneratorGoneError as error:
                await self.mark_lost(generator, error)

        await asyncio.gather(*(one(generator) for generator in self.serving))


def _new_tokens(completions: Sequence[Completion], request: SamplingRequest) -> int:
    """Without those that another request had sampled before."""
    begun = len(request.begun.token_ids) if request.begun else 0
    return sum(len(completion.token_ids) - begun for completion in completions)
