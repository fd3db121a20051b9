"""A generator that keeps its side of the contract in virtual time: it batches, freezes, dies, and comes back empty.

    sample ──> engine ──> completions whose tokens say what they are: the id of their sample, again and again

What weights sampled which token is noted in the ledger too, where nobody else can write.
"""

import asyncio
from collections.abc import Sequence
from itertools import count
from random import Random
from typing import Any

from megatron_async_rlhf.config.sections import GeneratorSection
from megatron_async_rlhf.errors import GeneratorError, GeneratorGoneError, GeneratorSilentError, InvariantError
from megatron_async_rlhf.generator.protocol import Pause, SamplingRequest
from megatron_async_rlhf.serving.connection import PAUSE, RECEIVE
from megatron_async_rlhf.serving.silence import StallDetector
from megatron_async_rlhf.simulate.engine import Engine, EngineSequence
from megatron_async_rlhf.simulate.exchange import Exchange
from megatron_async_rlhf.simulate.invariants import Ledger
from megatron_async_rlhf.simulate.scenario import Scenario
from megatron_async_rlhf.simulate.virtual_time import virtual_loop
from megatron_async_rlhf.types import Completion

_LEARNS_S = 0.001  # how long it takes until the whole pool knows what one request was told
_POLL_S = 0.005


class _Sample:
    """A completion under way: what it had before, and the rest in the engine."""

    __slots__ = ("begun", "id", "is_done", "length", "sequence")

    sequence: EngineSequence  # from its start on

    def __init__(self, id: int, length: int, begun: Completion | None) -> None:
        self.id, self.length, self.begun = id, length, begun
        self.is_done = False


class _Request:
    """All samples of one prompt."""

    __slots__ = ("answer", "order", "samples", "unfinished")

    def __init__(self, samples: list[_Sample], order: int) -> None:
        self.samples, self.order = samples, order
        self.unfinished = len(samples)
        self.answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()  # whether it was interrupted


class SimulatedGenerator:
    """One generator, through all its lives; implements `Generator` and `Receiver`.

    Attributes:
        version: of the weights, as the controller is told; -1 if it has none.
        started_at: when its process was.
        back_s: how long it takes to start it again.
        engines: of this life, and of those before.
    """

    tensor_parallel = 1

    def __init__(
        self,
        name: str,
        scenario: Scenario,
        ledger: Ledger,
        exchange: Exchange,
        limits: GeneratorSection,
        *,
        version: int,
        slowness: float = 1.0,
    ) -> None:
        self.name, self.version = name, version
        self._scenario, self._ledger, self._exchange = scenario, ledger, exchange
        self._places = min(limits.max_concurrent, scenario.places or limits.max_concurrent)
        self._slowness = slowness
        self._timeout_s, self._probe_timeout_s = limits.request_timeout_s, limits.probe_timeout_s
        self._silence = StallDetector(name, self._timeout_s)
        self._random = Random(f"{scenario.seed}/{name}")
        self._loop = virtual_loop()
        self._requests: dict[int, _Request] = {}
        self._numbers = count()
        self.started_at, self.back_s = self._loop.time(), scenario.back_s
        self._is_up, self._is_cut_off = True, False
        self._front_hangs = self._engine_hangs = False
        self._noticed_at: float | None = None  # when it was told first that this server is gone, or has no weights
        self.engines = [self._new_engine()]
        self._engine.set_weights(version)

    # Its clients: the pool and the weight sync.

    async def sample(self, request: SamplingRequest) -> list[Completion]:
        """As `Generator.sample`; like the real one, it only finds out afterwards that there were no weights."""
        await self._travel()
        await self._reach_front("/generate")
        is_empty, engine = self.version < 0, self._engine
        self._check_is_not_known_empty()
        self._ledger.asked(request)
        mine = _Request([self._begin(request, i) for i in range(request.samples)], request.order)
        number = next(self._numbers)
        self._requests[number] = mine
        for index, sample in enumerate(mine.samples):
            self._start(mine, sample, request, cached=self._scenario.shared_prompt_tokens if index else 0)
        try:
            interrupted = await self._silence.wait(self._answer(mine))
        except GeneratorGoneError:
            self._notice()
            raise
        finally:
            self._withdraw(engine, self._requests.pop(number))
        if is_empty:
            raise self._gone("its server was started again and has no weights yet")
        self._loop.progress()
        return [self._completion(engine, sample, request, interrupted) for sample in mine.samples]

    async def _answer(self, request: _Request) -> bool:
        """Whether it was interrupted."""
        interrupted = await request.answer
        await self._travel()
        return interrupted

    async def pause(self, how: Pause = "keep", *, clear_cache: bool = True) -> None:
        await self._travel()
        await self._reach(PAUSE)
        if how == "abort":
            for request in list(self._requests.values()):
                self._withdraw(self._engine, request)
                self._end(request, interrupted=True)
        if how == "wait":
            while not self._engine.is_idle:
                await asyncio.sleep(self._scenario.speeds.token_s)
        self._engine.pause()
        self._silence.pause()

    async def resume(self) -> None:
        await self._travel()
        await self._reach("/resume")
        self._silence.resume()
        self._engine.resume()

    def give_up(self) -> None:
        self._silence.give_up()

    async def wait_queued(self, count: int) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._silence.unless_given_up(self._has_queued(count))
        except TimeoutError:
            raise self._gone(f"{count} requests were not queued within {self._timeout_s:g} s") from None

    async def _has_queued(self, count: int) -> None:
        while len(self._requests) < count:
            await self._reach_front("/load")
            await asyncio.sleep(_POLL_S)

    async def probe(self) -> None:
        await self._reach("/collective_rpc", self._probe_timeout_s)

    async def join_transfer(self, info: dict[str, Any], *, timeout_s: float) -> None:
        await self._reach("/init_weight_transfer_engine", timeout_s)
        if self._is_cut_off:
            await asyncio.sleep(info["timeout_s"])
            raise GeneratorError(f"{self.name}: rendezvous: the learner did not come within {info['timeout_s']:g} s")
        await self._unless_gone(self._exchange.meet(info["session"], self.name))

    async def receive_weights(self, *, version: int, verify: bool, recompute: bool = True) -> None:
        await self._reach(RECEIVE)
        self._check_paused(version)
        self.version = -1
        arrived = await self._unless_gone(self._exchange.receive(self.name))
        if arrived != version:
            raise InvariantError(f"{self.name} was to receive version {version}, but the learner sent {arrived}")
        self._check_paused(version)
        self._engine.set_weights(version)
        if recompute:
            self._engine.recompute(sum(self._context(request) for request in self._requests.values()))
        self.version, self._noticed_at = version, None

    # Its fate.

    def crash(self) -> None:
        """Everything it did is lost."""
        self._is_up = False
        self._engine.stop()
        self._exchange.lose(self.name)
        for request in self._requests.values():
            if not request.answer.done():
                request.answer.set_exception(self._gone("the server is gone"))

    def hang(self, *, engine_alone: bool) -> None:
        """From now on nothing gets on, and nothing is answered but what the HTTP front knows itself."""
        if self._is_up:
            self._engine_hangs, self._front_hangs = True, not engine_alone
            self._engine.stop()

    def kill(self, since: float) -> None:
        """End a process that has done nothing since then, and start it again; a newer one is left alone."""
        if self._is_up and self.started_at < since:
            self.crash()
            self._loop.call_later(self.back_s, self.restart)

    def restart(self, *, cut_off: bool = False) -> None:
        """Another process, without weights; perhaps it cannot meet the learner."""
        if self._is_up:
            self.crash()
        self._is_up, self._is_cut_off = True, cut_off
        self._front_hangs = self._engine_hangs = False
        self.started_at = self._loop.time()
        self.version = -1
        if self._noticed_at is not None:
            self._noticed_at = self._loop.time()
        self.engines.append(self._new_engine())

    @property
    def _engine(self) -> Engine:
        return self.engines[-1]

    def _new_engine(self) -> Engine:
        return Engine(self._scenario.speeds, places=self._places, slowness=self._slowness)

    async def _reach(self, path: str, limit_s: float | None = None) -> None:
        """Raises GeneratorGoneError if the engine does not answer."""
        await self._reach_front(path, limit_s)
        if self._engine_hangs:
            await self._be_silent(path, limit_s)

    async def _reach_front(self, path: str, limit_s: float | None = None) -> None:
        """Raises GeneratorGoneError if the HTTP front does not answer."""
        if self._front_hangs:
            await self._be_silent(path, limit_s)
        if not self._is_up:
            raise self._gone(f"{path} failed, the server is gone")

    async def _be_silent(self, path: str, limit_s: float | None) -> None:
        limit, engine = limit_s or self._timeout_s, self._engine
        ends = self._loop.time() + limit
        while self._loop.time() < ends:
            await asyncio.sleep(min(1.0, ends - self._loop.time()))
            if not self._is_up or engine is not self._engine:
                raise self._gone(f"{path} failed, the server is gone")
        self._notice()
        raise GeneratorSilentError(f"{self.name}: no answer to {path} within {limit:g} s", silent_s=limit)

    def _gone(self, why: str) -> GeneratorGoneError:
        self._notice()
        return GeneratorGoneError(f"{self.name}: {why}")

    def _notice(self) -> None:
        if self._noticed_at is None:
            self._noticed_at = self._loop.time()

    async def _unless_gone(self, call: Any) -> Any:
        """An error that came because this process died is told as such."""
        engine = self._engine
        try:
            return await call
        except GeneratorError:
            if engine is not self._engine or not self._is_up:
                raise self._gone("the server is gone") from None
            await self._reach(RECEIVE)
            raise

    def _check_is_not_known_empty(self) -> None:
        known = self._noticed_at is not None and self._loop.time() > self._noticed_at + _LEARNS_S
        if known and self.version < 0:
            raise InvariantError(f"{self.name} is asked to sample, but it is known to have no weights")

    def _check_paused(self, version: int) -> None:
        if not self._engine.paused:
            raise InvariantError(f"{self.name} was to receive version {version} while it was running")
        self._ledger.check_empty_before_weights(self.name, self._engine.is_idle)

    def _begin(self, request: SamplingRequest, index: int) -> _Sample:
        begun = request.begun
        if begun is not None and begun.token_ids:
            id = begun.token_ids[0]
            return _Sample(id, self._ledger.samples[id].length, begun)
        drawn = self._scenario.lengths.draw(Random(request.seed * 1024 + index))
        id = self._ledger.new_sample(request, drawn)
        return _Sample(id, min(drawn, request.max_new_tokens), begun)

    def _start(self, mine: _Request, sample: _Sample, request: SamplingRequest, cached: int) -> None:
        before = len(sample.begun.token_ids) if sample.begun else 0
        prompt = len(request.prompt.token_ids) - cached + before

        def ended(_: EngineSequence) -> None:
            sample.is_done = True
            mine.unfinished -= 1
            if not mine.unfinished:
                self._end(mine, interrupted=False)

        sample.sequence = EngineSequence(sample.length - before, prompt, ended)
        self._engine.add(sample.sequence, request.order)

    def _end(self, request: _Request, *, interrupted: bool) -> None:
        if not request.answer.done():
            request.answer.set_result(interrupted)

    def _withdraw(self, engine: Engine, request: _Request) -> None:
        """What is not done will not be."""
        for sample in request.samples:
            if not sample.is_done:
                engine.remove(sample.sequence)

    def _context(self, request: _Request) -> int:
        """Tokens in the cache."""
        running = [s.sequence for s in request.samples if s.sequence in self._engine.running]
        return sum(sequence.prompt + self._engine.done(sequence) for sequence in running)

    async def _travel(self) -> None:
        longest = self._scenario.speeds.answer_s
        if longest:
            await asyncio.sleep(longest * self._random.random())

    def _completion(self, engine: Engine, sample: _Sample, request: SamplingRequest, interrupted: bool) -> Completion:
        begun = sample.begun
        new = sample.sequence.left if sample.is_done else engine.done(sample.sequence)
        versions = (begun.versions if begun else []) + engine.versions(sample.sequence, new)
        self._ledger.stamped(sample.id, versions)
        length = len(versions)
        wanted = self._ledger.samples[sample.id].drawn
        return Completion(
            token_ids=[sample.id] * length,
            logprobs=[-1.0] * length,
            versions=versions,
            finished=sample.is_done and wanted <= request.max_new_tokens,
            text="",
            interrupted=interrupted and not sample.is_done,
        )


def utilisation(generators: Sequence[SimulatedGenerator], wall_s: float) -> tuple[float, float, float]:
    """Over all: the share of time an engine decoded, the share it was frozen, and sequences it decoded at once then."""
    engines = [engine for generator in generators for engine in generator.engines]
    busy = sum(engine.busy_s for engine in engines)
    frozen = sum(engine.frozen_s for engine in engines)
    whole = wall_s * len(generators) or 1.0
    at_once = sum(engine.sequence_seconds for engine in engines) / busy if busy else 0.0
    return busy / whole, frozen / whole, at_once
