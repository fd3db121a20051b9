"""The RL loop: one generation loop and one learning loop over shared pacing state.

    prompts ──> generation loop ──> scored batches ──> learning loop ──> optimizer step ──┐
                     ▲                                      │                             │
                     └────────── weights, version v+1 <─────┴──────── version v+1 <───────┘

- generation loop: consumes prompts, produces scored batches into `_ready`; waits for `Pacer.may_submit`, which a
  push unblocks.
- learning loop: consumes `_ready`, produces policy versions; starts pushing them whenever the generators are between
  batches, trains otherwise, also while a push is under way; waits for either to be possible.

Between two steps the state is small: the version and what waits in `_ready`. When a checkpoint is due the learning loop
freezes it there and goes on; writing it ends in the background.

Synchronous training is the same two loops with a staleness bound of 0, which leaves them no room to overlap.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from statistics import fmean

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.data.prompts import PromptOrder
from megatron_async_rlhf.errors import NonFiniteLossError
from megatron_async_rlhf.generator.protocol import SamplingRequest
from megatron_async_rlhf.learner.protocol import Learner, TrainRollout
from megatron_async_rlhf.rewards.base import Reward
from megatron_async_rlhf.scheduler.pacing import Pacer
from megatron_async_rlhf.scheduler.pool import GeneratorPool, request_seed
from megatron_async_rlhf.scheduler.scoring import logprob_gaps, make_pairs, score_batch
from megatron_async_rlhf.scheduler.state import BEGINNING, Checkpoints, ControllerState, ReadyBatch
from megatron_async_rlhf.scheduler.weight_sync import WeightSync
from megatron_async_rlhf.telemetry.files import FAILED_BATCH
from megatron_async_rlhf.telemetry.recorder import Recorder
from megatron_async_rlhf.types import Span


class Controller:
    """Runs up to `schedule.steps` optimizer steps on generators that already hold the version of `state`."""

    def __init__(
        self,
        config: RunConfig,
        *,
        learner: Learner,
        pool: GeneratorPool,
        weight_sync: WeightSync,
        reward: Reward,
        prompts: PromptOrder,
        recorder: Recorder,
        checkpoints: Checkpoints,
        state: ControllerState = BEGINNING,
    ) -> None:
        self._config = config
        self._learner = learner
        self._pool = pool
        self._weight_sync = weight_sync
        self._reward = reward
        self._prompts = prompts
        self._recorder = recorder
        self._checkpoints = checkpoints
        self._pacer = Pacer(config.schedule.staleness_bound, state.version)
        self._ready: deque[ReadyBatch] = deque(state.ready)
        self._first_batch = state.next_batch
        self._push: asyncio.Task | None = None
        self._save: asyncio.Task | None = None
        self._changed = asyncio.Condition()
        self._stopping = False

    async def run(self) -> None:
        """Until the last step is trained and pushed, or `stop` was called.

        Raises:
            ExceptionGroup: of whatever learner, generators, rewards or pacing raised first.
        """
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            generation = tasks.create_task(self._generation_loop())
            await self._learning_loop()
            generation.cancel()

    async def stop(self) -> None:
        """Finish the optimizer step and push under way, then let `run` return."""
        self._stopping = True
        await self._notify()

    @property
    def version(self) -> int:
        return self._pacer.trained

    @property
    def state(self) -> ControllerState:
        """What another controller can go on from; between steps, or after `run`."""
        return ControllerState(version=self._pacer.trained, ready=list(self._ready))

    async def _generation_loop(self) -> None:
        """Consumes prompts, produces `_ready`; waits for pacing; unblocked by pushes."""
        for batch in range(self._first_batch, self._config.schedule.steps):
            await self._wait_until(lambda batch=batch: self._pacer.may_submit(batch))
            self._pacer.generating = True
            ready = await self._generate(batch)
            self._pacer.generating = False
            self._ready.append(ready)
            await self._notify()

    async def _learning_loop(self) -> None:
        """Consumes `_ready`, produces versions; waits for a batch or idle generators; unblocked by generation."""
        while True:
            await self._wait_until(lambda: self._is_over() or self._pacer.may_push() or self._ready)
            if self._is_over():
                return
            if self._pacer.may_push():
                await self._start_push()
                continue
            self._pacer.learner_busy = True
            await self._train(self._ready.popleft())
            if self._checkpoints.is_due(self.version):
                await self._start_save()
            self._pacer.learner_busy = False
            await self._notify()

    def _is_over(self) -> bool:
        steps = self._config.schedule.steps
        return self._stopping or self._pacer.trained == self._pacer.pushed == steps

    async def _generate(self, batch: int) -> ReadyBatch:
        config = self._config
        prompts = self._prompts.batch(batch, config.schedule.prompts_per_step)
        requests = [
            SamplingRequest(
                prompt=prompt,
                samples=config.algorithm.samples_per_prompt,
                seed=request_seed(config.run.seed, "train", batch, position),
                temperature=config.generator.temperature,
                max_new_tokens=config.generator.max_new_tokens,
                order=position,
            )
            for position, prompt in enumerate(prompts)
        ]
        self._recorder.activity("generators", f"batch {batch}")
        start = time.time()
        completions = await self._pool.sample(requests)
        end = time.time()
        self._recorder.activity("generators", "idle")
        self._recorder.generated(completions, Span(name=f"batch {batch}", start=start, end=end, process="generators"))
        scored = score_batch(prompts, completions, self._reward, config.algorithm.missing_eos_reward)
        return ReadyBatch(index=batch, scored=scored, generate_s=end - start)

    async def _train(self, ready: ReadyBatch) -> None:
        version = self._pacer.trained
        pairs = make_pairs(ready.scored.groups)
        tokens = (v for group in ready.scored.groups for c in group.completions for v in c.versions)
        ages = self._pacer.staleness(tokens)
        self._recorder.activity("learner", f"step {version}")
        start = time.time()
        try:
            answer = await self._learner.execute(TrainRollout(version=version, mini_batches=[pairs.training]))
        except NonFiniteLossError as error:
            saved = self._recorder.save_json(FAILED_BATCH, ready.scored.groups)
            raise NonFiniteLossError(f"{error}; the batch is in {saved}") from None
        end = time.time()
        self._recorder.activity("learner", "idle")
        # Generators get the version before this one first, however the two race: schedules do not depend on speed.
        await self._wait_until(lambda: not self._pacer.pushing)
        self._pacer.trained = version + 1
        gaps = logprob_gaps(pairs.completions, answer.logprobs, version)
        span = Span(name=f"step {version}", start=start, end=end, process="learner")
        groups = ready.scored.groups
        self._recorder.trained(groups, pairs.sequences, pairs.skipped, ages, span, answer.spans)
        self._recorder.logprob_gaps(gaps)
        metrics = {
            **ready.scored.metrics,
            **answer.steps[0].values,
            "reward_margin": pairs.margin,
            "pairs_skipped": pairs.skipped / len(groups),
            "staleness/mean": fmean(ages) if ages else 0.0,
            "staleness/max": max(ages, default=0),
            "time/generate_s": ready.generate_s,
            "time/train_s": end - start,
        }
        if gaps:
            metrics |= {"logprob_gap/mean_abs": fmean(gaps), "logprob_gap/max_abs": max(gaps)}
        self._recorder.step(version, metrics)
        self._recorder.samples(version, groups)
        self._checkpoints.observe(metrics)

    async def _start_save(self) -> None:
        """Freeze the state after a step; its files are written while the loop goes on."""
        for before in (self._push, self._save):  # what the totals should have in them, and the save before
            if before is not None:
                await before
        await self._checkpoints.start(self.state)
        self._save = self._tasks.create_task(self._checkpoints.complete())
        if not self._config.checkpoint.async_save:
            await self._save

    async def _start_push(self) -> None:
        """The learner has begun to send when this returns, so that a training command finds it at the next version."""
        version = self._pacer.trained
        self._pacer.pushing = True
        self._recorder.activity("learner", f"push {version}")
        await self._weight_sync.start(version)
        self._push = self._tasks.create_task(self._finish_push(version))

    async def _finish_push(self, version: int) -> None:
        await self._weight_sync.arrived()
        self._pacer.pushed = version
        self._pacer.pushing = False
        await self._notify()
        self._recorder.pushed(*await self._weight_sync.report())

    async def _wait_until(self, condition: Callable[[], object]) -> None:
        async with self._changed:
            await self._changed.wait_for(condition)

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()
