"""A learner and generators that only keep the contract: versions move, tokens carry them, time passes at random."""

import asyncio
import random
from pathlib import Path

from megatron_async_rlhf.generator.protocol import SamplingRequest
from megatron_async_rlhf.learner.protocol import (
    Answer,
    BeginPush,
    Command,
    FinishCheckpoint,
    FinishPush,
    JoinTransfer,
    PushReport,
    PushWeights,
    SaveCheckpoint,
    TrainRollout,
)
from megatron_async_rlhf.types import Completion, StepMetrics


class FakeLearner:
    """Every step takes a random time; the loss is 1. A checkpoint takes `polls` questions after it until it is there."""

    def __init__(self, rng: random.Random, version: int = 0, polls: int = 1) -> None:
        self.version = version
        self._polls = polls
        self._asked = 0
        self.commands: list[Command] = []
        self._offered: int | None = None
        self._rng = rng

    async def execute(self, command: Command) -> Answer:
        self.commands.append(command)
        await asyncio.sleep(self._rng.random() * 0.004)
        match command:
            case JoinTransfer():
                return Answer(id=0)
            case PushWeights():
                assert command.version == self.version
                self._verify = command.verify
                self._offered = command.version if command.offered else None
                return Answer(id=0)
            case BeginPush():
                return Answer(id=0, begun=command.version == self._offered)
            case FinishPush():
                return Answer(id=0, push=PushReport(wire_bytes=8, compared=1 if self._verify else 0))
            case SaveCheckpoint():
                self._asked = 0
                for directory in filter(None, (command.checkpoint, command.reference)):
                    Path(directory).mkdir(parents=True)
                return Answer(id=0)
            case FinishCheckpoint():
                self._asked += 1
                return Answer(id=0, saved=self._asked > self._polls)
        assert isinstance(command, TrainRollout)
        assert command.version == self.version
        self.version += 1
        self._offered = None
        return Answer(
            id=0,
            steps=[StepMetrics(values={"loss": 1.0})],
            logprobs=[
                [-1.0] * (len(s.token_ids) - s.prompt_length) for g in command.mini_batches[0] for s in g.sequences
            ],
        )


class FakeGenerator:
    """Samples `version` many letters; refuses weights while it is sampling."""

    tensor_parallel = 1

    def __init__(self, name: str, rng: random.Random, version: int = 0) -> None:
        self.name = name
        self.version = version
        self.sampling = 0
        self.seeds: list[int] = []
        self._rng = rng
        self._running = asyncio.Event()

    async def sample(self, request: SamplingRequest) -> list[Completion]:
        self.seeds.append(request.seed)
        self.sampling += 1
        await self._running.wait()
        await asyncio.sleep(self._rng.random() * 0.004)
        self.sampling -= 1
        rng = random.Random(request.seed)
        return [self._completion(rng.randint(0, 3)) for _ in range(request.samples)]

    def _completion(self, length: int) -> Completion:
        return Completion(
            token_ids=[7] * length,
            logprobs=[-1.0] * length,
            versions=[self.version] * length,
            finished=True,
            text="x" * length,
        )

    async def wait_queued(self, count: int) -> None:
        while self.sampling < count:
            await asyncio.sleep(0)

    async def pause(self, how: str = "keep", *, clear_cache: bool = True) -> None:
        assert not self.sampling
        self._running.clear()

    async def resume(self) -> None:
        self._running.set()

    def give_up(self) -> None:
        pass

    async def probe(self) -> None:
        pass

    async def wait_until_ready(self, limit_s: float) -> None:
        pass

    async def join_transfer(self, info: dict, *, timeout_s: float) -> None:
        pass

    async def receive_weights(self, *, version: int, verify: bool, recompute: bool = True) -> None:
        assert not self.sampling and not self._running.is_set()
        await asyncio.sleep(self._rng.random() * 0.008)
        assert not self.sampling and not self._running.is_set()
        self.version = version
