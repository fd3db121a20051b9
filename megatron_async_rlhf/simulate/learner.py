"""A learner that only counts: versions go up, time passes, commands are executed in turn, except BeginPush."""

import asyncio
from random import Random

from megatron_async_rlhf.errors import LearnerError, TransferError
from megatron_async_rlhf.learner.protocol import (
    Answer,
    BeginPush,
    Command,
    FinishPush,
    JoinTransfer,
    PushWeights,
    TrainRollout,
)
from megatron_async_rlhf.simulate.exchange import Exchange
from megatron_async_rlhf.simulate.invariants import Ledger
from megatron_async_rlhf.simulate.scenario import Speeds
from megatron_async_rlhf.simulate.virtual_time import virtual_loop
from megatron_async_rlhf.types import PushReport, StepMetrics


class SimulatedLearner:
    """Implements `Learner`.

    Attributes:
        version: optimizer steps so far.
        commands: that trained or pushed, in order; without what they were about if `forgets`.
    """

    def __init__(
        self, speeds: Speeds, ledger: Ledger, exchange: Exchange, *, version: int = 0, forgets: bool = True
    ) -> None:
        self.version = version
        self.commands: list[Command] = []
        self._speeds, self._ledger, self._exchange = speeds, ledger, exchange
        self._forgets = forgets
        self._turn = asyncio.Lock()
        self._pushes = False
        self._offered: int | None = None
        self._random, self._deviation = Random(0), 0.0

    async def execute(self, command: Command) -> Answer:
        if isinstance(command, BeginPush):
            return self._begin_push(command)
        async with self._turn:
            match command:
                case JoinTransfer():
                    await self._exchange.meet_learner(command.session, command.generators)
                    return Answer(id=0)
                case PushWeights():
                    return self._push(command)
                case FinishPush():
                    return await self._finish_push()
                case TrainRollout():
                    return await self._train(command)
        raise LearnerError(f"a simulated learner cannot {type(command).__name__}")

    def _push(self, command: PushWeights) -> Answer:
        if command.version != self.version:
            raise LearnerError(f"version {command.version} is to be pushed, but the learner is at {self.version}")
        if self._pushes:
            raise LearnerError("PushWeights came before the push under way was finished with FinishPush")
        if command.offered:
            self._offered = command.version
            return Answer(id=0)
        self._pushes = True
        self.commands.append(command)
        self._exchange.begin(command.version)
        return Answer(id=0)

    def _begin_push(self, command: BeginPush) -> Answer:
        begun = self._offered == command.version
        if begun:
            self._offered = None
            self._pushes = True
            self.commands.append(PushWeights(version=command.version, verify=True))
            self._exchange.begin(command.version)
        return Answer(id=0, begun=begun)

    async def _finish_push(self) -> Answer:
        if not self._pushes:
            raise LearnerError("FinishPush came without PushWeights")
        self._pushes = False
        await asyncio.sleep(self._speeds.answer_s / 2)
        push = self._exchange.push
        assert push is not None  # `_push` began it
        why = await push.outcome()
        if why:
            raise TransferError(why)
        return Answer(id=0, push=PushReport(wire_bytes=0))

    async def _train(self, command: TrainRollout) -> Answer:
        self._ledger.train(command, self.version)
        empty = TrainRollout(version=command.version, mini_batches=[], epochs=command.epochs)
        self.commands.append(empty if self._forgets else command)
        tokens = [
            sum(len(sequence.token_ids) for group in batch for sequence in group.sequences)
            for batch in command.mini_batches
        ]
        updates = len(tokens) * command.epochs
        seconds = updates * self._speeds.train_s + sum(tokens) * command.epochs * self._speeds.train_token_s
        await asyncio.sleep(seconds * self._variation())
        self._offered = None
        if self._exchange.push is not None:
            await self._exchange.push.outcome()  # weights do not change while they are being sent
        self.version += updates
        virtual_loop().progress()
        first = [s for group in command.mini_batches[0] for s in group.sequences] if command.mini_batches else []
        return Answer(
            id=0,
            steps=[StepMetrics(values={"loss": 1.0})] * updates,
            logprobs=[[-1.0] * (len(s.token_ids) - s.prompt_length) for s in first],
        )

    def _variation(self) -> float:
        """A rollout's time over the mean. Each deviation comes with its opposite, so that a few already have that mean."""
        deviation, self._deviation = -self._deviation, 0.0
        if not deviation:
            deviation = self._deviation = self._random.gauss(0, self._speeds.jitter)
        return min(1.9, max(0.1, 1 + deviation))
