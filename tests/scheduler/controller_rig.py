"""The real controller, recorder and saver among fakes."""

import asyncio
import io
import random

from scheduler_fakes import FakeGenerator, FakeLearner

from megatron_async_rlhf.checkpoint.run_state import RunState
from megatron_async_rlhf.checkpoint.saver import CheckpointSaver
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.data.prompts import PromptOrder
from megatron_async_rlhf.learner.protocol import PushWeights, TrainRollout
from megatron_async_rlhf.rewards.base import Reward, Score, Verifier
from megatron_async_rlhf.scheduler.controller import Controller
from megatron_async_rlhf.scheduler.evaluation import Evaluation
from megatron_async_rlhf.scheduler.pool import GeneratorPool
from megatron_async_rlhf.scheduler.state import BEGINNING
from megatron_async_rlhf.scheduler.weight_sync import WeightSync
from megatron_async_rlhf.telemetry.events import EventStream
from megatron_async_rlhf.telemetry.recorder import Recorder
from megatron_async_rlhf.types import Prompt

SHAPE = {"layers": 2, "hidden_size": 64, "ffn_size": 96, "heads": 2, "context_length": 96}


class LengthReward(Verifier):
    """The longer the better."""

    def check(self, prompt):
        pass

    def judge(self, prompt, completion):
        return Score(reward=float(len(completion.token_ids)), metrics={})


class Rig:
    """A controller with fakes around it, from the beginning or from `resumed`; its run directory is `directory`."""

    def __init__(
        self,
        directory,
        *,
        seed=0,
        replicas=1,
        polls=1,
        checkpoint={},
        resumed: RunState | None = None,
        held_out=0,
        reward: Reward | None = None,
        **schedule,
    ):
        rng = random.Random(seed)
        reward = reward or LengthReward()
        schedule = {"steps": 6, "prompts_per_step": 3, **schedule}
        self.config = RunConfig.model_validate(
            {"model": SHAPE, "schedule": schedule, "run": {"seed": seed}, "checkpoint": checkpoint}
        )
        (directory / "model").mkdir(exist_ok=True)
        (directory / "model/config.json").write_text("{}")
        state = resumed.controller if resumed else BEGINNING
        self.learner = FakeLearner(rng, state.version, polls)
        self.generators = [FakeGenerator(f"generator.{i}", rng, state.version) for i in range(replicas)]
        self.recorder = Recorder(
            self.config,
            directory,
            EventStream(io.StringIO()),
            generator_bytes=8,
            totals=resumed.totals if resumed else None,
        )
        self.saver = CheckpointSaver.of_run(self.config, directory, self.learner, self.recorder, resumed)
        prompts = [Prompt(index=i, text=str(i), token_ids=[1, 2], reference={}) for i in range(20)]
        self.prompts = PromptOrder(prompts, seed)
        self.controller = Controller(
            self.config,
            learner=self.learner,
            pool=GeneratorPool(self.generators, max_concurrent=8, return_timeout_s=5, silence_limit_s=5),
            weight_sync=WeightSync(self.learner, self.config, ("127.0.0.1", 1)),
            reward=reward,
            prompts=self.prompts,
            recorder=self.recorder,
            checkpoints=self.saver,
            evaluation=Evaluation(self.config, prompts[:held_out], reward, self.recorder),
            state=state,
        )

    def run(self):
        async def bounded():
            async with asyncio.timeout(20):
                await self.controller.run()

        asyncio.run(bounded())
        self.recorder.close("completed", None)

    async def run_until(self, version):
        """Stopped once the learner has reached it; ends with the step under way."""
        running = asyncio.create_task(self.controller.run())
        while self.learner.version < version:
            await asyncio.sleep(0.001)
        await self.controller.stop()
        async with asyncio.timeout(5):
            await running

    def order(self):
        """What the learner did: a version for each training step, `p` and a version for each push."""
        names = {TrainRollout: "", PushWeights: "p"}
        return [f"{names[type(c)]}{c.version}" for c in self.learner.commands if type(c) in names]
