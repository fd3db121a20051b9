"""Composition root of the controller process: builds every object from the config, then runs the phases in order.

    start learner ─> warm start ─> reference ─┐
                                              ├─> push version 0 ─> evaluate ─> RL loop ─> export ─> evaluate
    start generators, reward models ──────────┘

A run that continues from a checkpoint loads it instead of the warm start, pushes its version and is not evaluated before.
If its servers have stayed while the learner was started again, those that do not answer are waited for in the loop, as any
that is lost there, and get their weights with its first push.
An interrupted run saves a checkpoint, and gives up an evaluation that is not over. In the warm start there is nothing to
save yet: it ends at once.
"""

import asyncio
import signal
from contextlib import asynccontextmanager
from pathlib import Path

from megatron_async_rlhf.checkpoint.run_checkpoints import RunCheckpoints
from megatron_async_rlhf.checkpoint.run_state import RunState, read_run_state
from megatron_async_rlhf.checkpoint.saver import CheckpointSaver
from megatron_async_rlhf.clock import now
from megatron_async_rlhf.config.load import load_config
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.data.prompts import PromptOrder
from megatron_async_rlhf.errors import (
    AsyncRLHFError,
    GeneratorError,
    GeneratorSilentError,
    MismatchError,
    ProcessDiedError,
    RewardError,
)
from megatron_async_rlhf.formats.tensor_spec import ITEM_BYTES
from megatron_async_rlhf.generator.places import places
from megatron_async_rlhf.generator.protocol import Generator
from megatron_async_rlhf.generator.vllm.client import VLLMGenerator
from megatron_async_rlhf.jobs.addresses import Addresses
from megatron_async_rlhf.jobs.inputs import RunInputs, data_counts, load_run_inputs
from megatron_async_rlhf.jobs.lifecycle import (
    END_AT_ONCE,
    begin_reinforcement,
    close_failed,
    close_well,
    export_policy,
    first_cause,
    release_learner,
    resume_reinforcement,
    seconds_left,
)
from megatron_async_rlhf.jobs.reward_models import ServedRewards
from megatron_async_rlhf.learner.client import LearnerClient
from megatron_async_rlhf.learner.protocol import WaitUntilReady
from megatron_async_rlhf.models.hf_mapping import elements_held
from megatron_async_rlhf.scheduler.controller import Controller
from megatron_async_rlhf.scheduler.evaluation import Evaluation
from megatron_async_rlhf.scheduler.pool import GeneratorPool
from megatron_async_rlhf.scheduler.recording import RolloutLog
from megatron_async_rlhf.scheduler.state import BEGINNING
from megatron_async_rlhf.scheduler.weight_sync import WeightSync
from megatron_async_rlhf.telemetry.events import EventStream
from megatron_async_rlhf.telemetry.files import POLICY_TEMPLATE_DIR, RESOLVED_CONFIG, ROLLOUT_DIR
from megatron_async_rlhf.telemetry.recorder import Recorder


class _GivenUp(Exception):
    """The run was interrupted before there was anything to save."""


class Job:
    """One training run, seen from the controller process."""

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        run_inputs: RunInputs,
        learner: LearnerClient,
        generators: list[VLLMGenerator],
        addresses: Addresses,
        resumed: RunState | None,
        *,
        servers_stayed: bool = False,
    ) -> None:
        """
        Args:
            servers_stayed: they have been up before, and served another controller.
        """
        self._config = config
        self._resumed, self._servers_stayed = resumed, servers_stayed
        self._run_dir = run_dir
        self._run_inputs = run_inputs
        self._learner = learner
        self._generators = generators
        elements = elements_held(run_inputs.architecture, config.generator.tensor_parallel)
        held = elements * ITEM_BYTES[config.generator.dtype]
        self.recorder = Recorder(
            config, run_dir, EventStream(), generator_bytes=held, totals=resumed.totals if resumed else None
        )
        self.recorder.totals.data = data_counts(run_inputs.data)
        self._pool = GeneratorPool(
            generators,
            max_concurrent=config.generator.max_concurrent,
            return_timeout_s=config.generator.start_timeout_s,
            # After a failed push the workers themselves wait in vain first.
            silence_limit_s=config.generator.probe_timeout_s + config.weights.timeout_s,
            on_lost=self._lost,
            on_silent=self._silent,
        )
        self._rewards = ServedRewards(config, run_inputs.reward, addresses.rewards, self.recorder)
        prompts = PromptOrder(run_inputs.train, config.run.seed)
        evaluation = Evaluation(config, run_inputs.eval, run_inputs.reward, self.recorder)
        assert addresses.transfer is not None  # a training job has generators
        self._weight_sync = WeightSync(learner, config, addresses.transfer)
        self._saver = CheckpointSaver.of_run(config, run_dir, learner, self.recorder, resumed)
        self._controller = Controller(
            config,
            learner=learner,
            pool=self._pool,
            weight_sync=self._weight_sync,
            reward=run_inputs.reward,
            prompts=prompts,
            recorder=self.recorder,
            checkpoints=self._saver,
            evaluation=evaluation,
            rollouts=RolloutLog(run_dir / ROLLOUT_DIR) if config.schedule.record else None,
            state=resumed.controller if resumed else BEGINNING,
        )
        self.cut_short = self._interrupted = self._gives_up = False
        self._warm_start: asyncio.Task | None = None
        self._evaluating: asyncio.Task | None = None
        self._began = now()

    async def run(self) -> None:
        """All phases; an interrupt ends loop and evaluations early, saves and exports what there is."""
        self.recorder.phase("start")
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._start_learner())
                tasks.create_task(self._start_generators())
                tasks.create_task(self._start_rewards())
        except* _GivenUp:
            self.cut_short = True
        if self.cut_short:
            await release_learner(self._learner, self.recorder)
            return
        if not self._servers_stayed:
            self.recorder.pushed(*await self._weight_sync.push(self._controller.version, self._pool.alive))
        if "before" not in self.recorder.totals.evaluation:
            await self._evaluate("before")
        self.recorder.phase("train", steps=self._config.schedule.steps)
        self.recorder.loop_started(startup_s=now() - self._began)
        try:
            await self._controller.run()
        except (RewardError, GeneratorError):
            await self._save()  # of what is trained nothing is lost
            raise
        self.recorder.loop_ended()
        if self._interrupted:
            await self._save()
        await export_policy(self._config, self._run_dir, self._learner, self.recorder)
        try:
            await self._evaluate("after")
        except* (RewardError, GeneratorError):
            await self._save()  # else an evaluation that fails would cost the whole training
            raise
        self.cut_short = self._interrupted  # an interrupt from now on comes too late to change anything
        if self.cut_short:
            await self._save()
        await release_learner(self._learner, self.recorder)

    async def close(self) -> None:
        await self._rewards.close()

    async def out_of_time(self) -> None:
        """As `interrupt`, because `checkpoint.max_run_seconds` are over; but a warm start continues to its end, and is saved."""
        self.recorder.note(f"checkpoint.max_run_seconds = {self._config.checkpoint.max_run_seconds:g} are over")
        await self._end_early()

    async def interrupt(self) -> None:
        """Let the step under way finish, then save, export and end."""
        self._gives_up = True
        if self._warm_start is not None:
            self._warm_start.cancel()
        await self._end_early()

    async def _end_early(self) -> None:
        self._interrupted = True
        if self._evaluating is not None:
            self._evaluating.cancel()
        await self._controller.stop()

    async def _start_learner(self) -> None:
        await self._learner.execute(WaitUntilReady())
        if self._resumed is not None:
            version = self._resumed.controller.version
            await resume_reinforcement(self._config, self._run_dir, version, self._learner, self.recorder)
            return
        if self._gives_up:
            raise _GivenUp
        starting = begin_reinforcement(self._config, self._learner, self._run_inputs, self.recorder)
        self._warm_start = asyncio.create_task(starting)
        await asyncio.wait([self._warm_start])
        if self._warm_start.cancelled():
            raise _GivenUp
        self._warm_start.result()

    async def _save(self) -> None:
        state = self._controller.state
        if not self._saver.is_saved(state.version):
            self.recorder.phase(f"save checkpoint of step {state.version}")
            await self._saver.start(state)
            await self._saver.complete()

    async def _start_generators(self) -> None:
        if self._servers_stayed:
            await self._pool.rejoin(self._is_up)
            return
        for generator in self._generators:
            await generator.wait_until_ready(self._config.generator.start_timeout_s)
            self._is_up(generator)

    async def _start_rewards(self) -> None:
        await self._rewards.start(self._run_dir, self._run_inputs.train, servers_stayed=self._servers_stayed)

    def _is_up(self, generator: Generator) -> None:
        self.recorder.activity("generators", f"{generator.name} is up")

    async def _evaluate(self, when: str) -> None:
        """Unless the run is interrupted before it is over."""
        if self._interrupted:
            return
        self.recorder.phase(f"evaluate {when}")
        self._evaluating = asyncio.create_task(self._controller.evaluate(when))
        try:
            await asyncio.wait([self._evaluating])
        finally:
            self._evaluating.cancel()
        if not self._evaluating.cancelled():
            self._evaluating.result()

    def _lost(self, generator: Generator, samples: int) -> None:
        self.recorder.cancelled(samples)
        self.recorder.activity("generators", f"{generator.name} is gone")

    def _silent(self, generator: Generator, error: GeneratorSilentError) -> None:
        self.recorder.unresponsive(generator.name, error)


@asynccontextmanager
async def _connected(config: RunConfig, run_inputs: RunInputs, addresses: Addresses):
    learner = LearnerClient(addresses.learner, timeout_s=config.learner.timeout_s)
    generators = [
        VLLMGenerator(
            f"generator.{i}",
            url,
            tokenizer=run_inputs.tokenizer,
            tensor_parallel=config.generator.tensor_parallel,
            request_timeout_s=config.generator.request_timeout_s,
            probe_timeout_s=config.generator.probe_timeout_s,
            places=places(config),
        )
        for i, url in enumerate(addresses.generators)
    ]
    try:
        yield learner, generators
    finally:
        run_inputs.reward.close()
        learner.close()
        for generator in generators:
            await generator.close()


async def run_job(run_dir: Path, addresses: Addresses, resume_from: int | None, *, servers_stayed: bool = False) -> int:
    """Run the whole job; returns the process's exit code. Every outcome leaves a summary.

    Args:
        servers_stayed: see `Job`.
    """
    config = load_config(run_dir / RESOLVED_CONFIG)
    run_inputs = load_run_inputs(config, run_dir / POLICY_TEMPLATE_DIR)
    resumed = None if resume_from is None else read_run_state(RunCheckpoints(run_dir).path(resume_from))
    async with _connected(config, run_inputs, addresses) as (learner, generators):
        job = Job(config, run_dir, run_inputs, learner, generators, addresses, resumed, servers_stayed=servers_stayed)
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None  # a coroutine runs in one
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, lambda: loop.create_task(job.interrupt()))
        loop.add_signal_handler(END_AT_ONCE, task.cancel)
        if (left := seconds_left(config)) is not None:
            loop.call_later(left, lambda: loop.create_task(job.out_of_time()))
        try:
            await job.run()
        except BaseExceptionGroup as group:
            return _fail(job, first_cause(group))
        except (AsyncRLHFError, OSError) as error:
            return _fail(job, error)
        except asyncio.CancelledError:
            return _fail(job, ProcessDiedError("ended because another process of the run has"))
        finally:
            await job.close()
        return close_well(job.recorder, "interrupted" if job.cut_short else "completed")


def _fail(job: Job, error: BaseException) -> int:
    if isinstance(error, MismatchError):
        job.recorder.mismatched(error.compared, len(error.mismatches))
    return close_failed(job.recorder, error)
