"""All generators as one: requests go to whoever has the least to do, and elsewhere when a generator dies.

    serving ──(gone)──> lost ──(answers again)──> returned ──(a push reached it)──> serving

Two ways to sample. `sample_together`: requests are dealt in a fixed order, queued while the engines are paused, and run
in that order, so that which sequences share a forward pass does not depend on the network. `sample`: a request goes to
the least loaded generator at once.
"""

import asyncio
import heapq
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto

import msgspec

from megatron_async_rlhf.errors import GeneratorError, GeneratorGoneError
from megatron_async_rlhf.generator.protocol import Generator, Pause, SamplingRequest
from megatron_async_rlhf.generator.seeds import request_seed
from megatron_async_rlhf.telemetry.busy import GeneratorsBusy
from megatron_async_rlhf.types import Completion

_WATCH_S = 0.5
_MOST_LOSSES = 9  # of generators with one request under way


class Standing(Enum):
    """Of a generator in its pool."""

    SERVING = auto()
    LOST = auto()
    RETURNED = auto()


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
        returned: those that are alive again, without weights.
        on_change: awaited when that has changed.
        busy: told when each of them samples.
    """

    def __init__(
        self,
        generators: Sequence[Generator],
        *,
        max_concurrent: int,
        return_timeout_s: float,
        on_lost: Callable[[Generator, int], None] = lambda generator, samples: None,
    ) -> None:
        """
        Args:
            max_concurrent: completions one generator samples at once.
            return_timeout_s: how long all of them may be lost.
            on_lost: told of every request that died with its generator: how many completions of the run it was for.
        """
        self.members = [Member(generator, place) for place, generator in enumerate(generators)]
        self._max_concurrent = max_concurrent
        self._return_timeout_s = return_timeout_s
        self._on_lost = on_lost
        self._changed = asyncio.Condition()
        self.on_change: Callable[[], Awaitable[None]] | None = None
        self.busy = GeneratorsBusy(time.time, on_any=lambda span: None, on_one=lambda span: None)
        self._last_loss = "none answered"
        self._paused = False
        self._recount()

    @property
    def version(self) -> int:
        """The version of the most outdated generator that serves."""
        return min(generator.version for generator in self.serving)

    @property
    def room(self) -> int:
        """Completions that could start at once."""
        return self._room

    async def sample_together(self, requests: Sequence[SamplingRequest]) -> list[list[Completion]]:
        """Completions of every request, in order, which is the one they run in. Nothing else may be running."""
        requests = [msgspec.structs.replace(request, order=place) for place, request in enumerate(requests)]
        await self.pause()
        members = await self._available()
        shares = [requests[i :: len(members)] for i in range(len(members))]
        async with asyncio.TaskGroup() as tasks:
            pending = [
                [tasks.create_task(self._sample_at(member, request)) for request in share]
                for member, share in zip(members, shares, strict=True)
            ]
            queued = [
                tasks.create_task(self._wait_queued(member, len(share)))
                for member, share in zip(members, shares, strict=True)
            ]
            await asyncio.gather(*queued)
            await self.resume()
        answers = [[task.result() for task in share] for share in pending]
        return [answers[i % len(answers)][i // len(answers)] for i in range(len(requests))]

    async def sample(self, request: SamplingRequest, losses: int = 0) -> list[Completion]:
        """Completions of one request, from start to end, wherever that takes it; `losses` generators died of it."""
        if self._paused:
            async with self._changed:
                await self._changed.wait_for(lambda: not self._paused)
        await self._available()
        return await self._sample_at(self._least_loaded(), request, losses)

    def hold(self) -> None:
        """Start nothing until `resume`."""
        self._paused = True

    async def pause(self, how: Pause = "keep") -> None:
        self.hold()
        await self._everywhere(lambda generator: generator.pause(how))

    async def resume(self) -> None:
        await self._everywhere(lambda generator: generator.resume())
        self._paused = False
        async with self._changed:
            self._changed.notify_all()

    async def watch(self, on_return: Callable[[Generator], object]) -> None:
        """For ever: notice when lost generators answer again.

        Raises:
            GeneratorError: all are lost, and none came back in time.
        """
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: self._lost)
            deadline = asyncio.get_running_loop().time() + self._return_timeout_s
            while lost := self._lost:
                for member in lost:
                    if await member.generator.is_ready():
                        await self._stand(Standing.RETURNED, member)
                        on_return(member.generator)
                if len(lost) == len(self.members) == len(self._lost):
                    if asyncio.get_running_loop().time() > deadline:
                        raise self._nobody_left()
                else:
                    deadline = asyncio.get_running_loop().time() + self._return_timeout_s
                await asyncio.sleep(_WATCH_S)

    async def lost(self, generator: Generator, error: GeneratorGoneError) -> None:
        """A generator does not answer any more."""
        self._last_loss = str(error)
        await self._stand(Standing.LOST, *(member for member in self.members if member.generator is generator))

    async def updated(self, generators: Sequence[Generator]) -> None:
        """These hold the newest weights, all others none."""
        names = {generator.name for generator in generators}
        await self._stand(Standing.LOST, *(m for m in self._serving if m.generator.name not in names))
        await self._stand(Standing.SERVING, *(m for m in self.members if m.generator.name in names))

    async def without_weights(self, lost: Sequence[Generator]) -> None:
        """A push failed: these are gone, and all others hold parts of two versions."""
        names = {generator.name for generator in lost}
        await self._stand(Standing.LOST, *(m for m in self.members if m.generator.name in names))
        await self._stand(Standing.RETURNED, *self._serving)

    async def _sample_at(self, member: Member, request: SamplingRequest, losses: int = 0) -> list[Completion]:
        self._add_load(member, request.samples)
        try:
            with self.busy.at(member.generator.name) as busy:
                completions = await member.generator.sample(request)
                whole = sum(not completion.interrupted for completion in completions)
                busy.done(samples=whole, tokens=_new_tokens(completions, request))
        except GeneratorGoneError as error:
            if losses == _MOST_LOSSES:
                raise GeneratorError(
                    f"a request failed at {losses + 1} generators one after the other, which is hardly their fault; if it "
                    f"takes longer than generator.request_timeout_s, raise that: {error}"
                ) from None
            await self.lost(member.generator, error)
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
        """Go on with one of a request's completions that was cut off, until it is whole."""
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
            await self.lost(member.generator, error)

    async def _available(self) -> list[Member]:
        """Members that serve, once there are any."""
        if not self._serving:
            async with self._changed:
                await self._changed.wait_for(lambda: self._serving)
        return self._serving

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
        async with self._changed:
            self._changed.notify_all()
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

    async def _everywhere(self, call: Callable[[Generator], object]) -> None:
        async def one(generator: Generator) -> None:
            try:
                await call(generator)
            except GeneratorGoneError as error:
                await self.lost(generator, error)

        await asyncio.gather(*(one(generator) for generator in self.serving))


def _new_tokens(completions: Sequence[Completion], request: SamplingRequest) -> int:
    """Without those that another request had sampled before."""
    begun = len(request.begun.token_ids) if request.begun else 0
    return sum(len(completion.token_ids) - begun for completion in completions)
