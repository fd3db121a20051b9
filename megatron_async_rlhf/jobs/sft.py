"""Composition root of the controller process of `async-rlhf sft`: supervised fine-tuning on the data's own answers.

    start learner ─> loss on held-out answers ─> steps ─> loss on held-out answers ─> export
                                                  └─ checkpoints, and losses on held-out answers, on the way

The same learner as in a run, without generators. With a `sft` section it is a stage of its own; without one it makes the
warm start of a run, alone, so that many runs can start from one policy: `model.hf: <run>/checkpoints/final`.

An interrupted stage saves a checkpoint, exports nothing, and continues with `--resume`.
"""

import asyncio
import math
from pathlib import Path

from megatron_async_rlhf.checkpoint.run_checkpoints import RunCheckpoints
from megatron_async_rlhf.checkpoint.run_state import RunState, read_run_state
from megatron_async_rlhf.checkpoint.saver import CheckpointSaver, Kept
from megatron_async_rlhf.clock import now
from megatron_async_rlhf.config.load import load_config
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.jobs.addresses import Addresses
from megatron_async_rlhf.jobs.inputs import data_counts
from megatron_async_rlhf.jobs.lifecycle import export_policy, release_learner, run_learner_alone, seconds_left
from megatron_async_rlhf.jobs.supervised_inputs import SupervisedInputs, load_supervised_inputs
from megatron_async_rlhf.learner.client import LearnerClient
from megatron_async_rlhf.learner.protocol import (
    EvaluateSupervised,
    Learner,
    ResumeSupervised,
    StartSupervised,
    TrainSupervised,
    WaitUntilReady,
)
from megatron_async_rlhf.scheduler.state import ControllerState
from megatron_async_rlhf.telemetry.events import EventStream
from megatron_async_rlhf.telemetry.files import POLICY_TEMPLATE_DIR, RESOLVED_CONFIG
from megatron_async_rlhf.telemetry.recorder import Recorder
from megatron_async_rlhf.telemetry.summary import RunTotals

_EVALUATED_TOGETHER = 256  # sequences of one command
KEPT = Kept(metric="loss", best="lowest")  # of the checkpoints that have a held-out loss


class SFTJob:
    """One stage, seen from the controller process."""

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        inputs: SupervisedInputs,
        learner: Learner,
        recorder: Recorder,
        resumed: RunState | None = None,
    ) -> None:
        self._config, self._keys, self._run_dir, self._inputs = config, config.supervised, run_dir, inputs
        self._learner, self._recorder = learner, recorder
        self._checkpoints = RunCheckpoints(run_dir)
        self._saver = CheckpointSaver(config, run_dir, learner, recorder, resumed, kept=KEPT, has_reference=False)
        self._step = 0 if resumed is None else resumed.controller.version
        self._save: asyncio.Task[None] | None = None
        self._is_stopped = False

    def stop(self) -> None:
        """Let the step under way finish, then save and end."""
        self._is_stopped = True

    async def run(self) -> bool:
        """All phases; whether it was stopped before its end.

        Raises:
            LearnerError: a step failed, or took longer than learner.timeout_s.
        """
        began, recorder = now(), self._recorder
        recorder.phase("start")
        await self._learner.execute(WaitUntilReady())
        await self._begin()
        if not self._step:
            await self._evaluate("before")
        recorder.phase("train", steps=len(self._inputs.batches))
        recorder.loop_started(startup_s=now() - began)
        while self._step < len(self._inputs.batches) and not self._is_stopped:
            await self._train()
        recorder.loop_ended()
        if self._save is not None:
            await self._save
        last = None if self._is_stopped else await self._evaluate("after")
        was_stopped = self._is_stopped  # from now on it comes too late to change anything
        if was_stopped:
            await self._save_now()
        else:
            if await self._take_best(last):
                await self._evaluate("after", gives_up=False)  # which is of the policy that is exported
            await export_policy(self._config, self._run_dir, self._learner, self._recorder)
        await release_learner(self._learner, self._recorder)
        return was_stopped

    async def _begin(self) -> None:
        steps = len(self._inputs.batches)
        if not self._step:
            await self._learner.execute(StartSupervised(steps=steps))
            return
        self._recorder.phase(f"load checkpoint of step {self._step}")
        await self._load(self._step)

    async def _load(self, step: int) -> None:
        path = str(self._checkpoints.path(step))
        await self._learner.execute(ResumeSupervised(checkpoint=path, steps=len(self._inputs.batches)))

    async def _train(self) -> None:
        """One step, and what is due after it."""
        sequences = [self._inputs.train.rows[row] for row in self._inputs.batches[self._step]]
        self._step += 1
        answer = await self._learner.execute(TrainSupervised(step=self._step, sequences=sequences))
        assert answer.metrics is not None  # which is what the command was for
        self._recorder.totals.tokens_trained += sum(row.num_targets for row in sequences)
        self._recorder.supervised_step(
            self._step, len(self._inputs.batches), answer.metrics.values, len(sequences), answer.spans
        )
        loss = None
        if self._keys.eval_every is not None and self._step % self._keys.eval_every == 0:
            loss = await self._evaluate(f"step {self._step}")
        is_best = self._keys.export == "best" and loss is not None and self._saver.is_best(loss)
        if is_best or self._saver.is_due(self._step):
            if loss is not None:  # which is of the weights that are saved; one of others says nothing of them
                self._saver.observe({"loss": loss})
            await self._save_now()

    async def _save_now(self) -> None:
        """Freeze the state; its files are written while training continues."""
        if self._save is not None:
            await self._save
            self._save = None
        if self._saver.is_saved(self._step):
            return
        await self._saver.start(ControllerState(version=self._step))
        self._save = asyncio.create_task(self._saver.complete())
        if self._is_stopped or not self._config.checkpoint.async_save:
            await self._save

    async def _evaluate(self, when: str, *, gives_up: bool = True) -> float | None:
        """The loss on held-out answers; None if there are none, or it was given up to save and end."""
        rows, start = self._inputs.held_out, now()
        if not rows:
            return None
        total = 0.0
        for first in range(0, len(rows), _EVALUATED_TOGETHER):
            if self._is_stopped and gives_up:
                return None
            part = rows[first : first + _EVALUATED_TOGETHER]
            answer = await self._learner.execute(EvaluateSupervised(sequences=part))
            assert answer.metrics is not None  # which is what the command was for
            total += answer.metrics.values["loss"] * answer.metrics.values["tokens"]
        tokens = sum(row.num_targets for row in rows)
        loss = total / tokens
        metrics = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        self._recorder.evaluated(when, metrics, start, now(), version=self._step, samples=len(rows), tokens=tokens)
        return loss

    async def _take_best(self, last: float | None) -> bool:
        """Load the checkpoint with the lowest held-out loss, if that is what to export and the `last` policy has a higher one."""
        best = self._saver.best
        if self._keys.export != "best" or last is None or best is None or best == self._step:
            return False
        if self._saver.is_best(last):
            return False
        self._recorder.note(f"the policy after step {best} had the lowest held-out loss: exporting that")
        await self._load(best)
        self._step = best
        return True


async def run_job(run_dir: Path, addresses: Addresses, resume_from: int | None) -> int:
    """Run all phases; returns the process's exit code. Every outcome leaves a summary."""
    config = load_config(run_dir / RESOLVED_CONFIG)
    inputs = load_supervised_inputs(config, run_dir / POLICY_TEMPLATE_DIR)
    resumed = None if resume_from is None else read_run_state(RunCheckpoints(run_dir).path(resume_from))
    totals = RunTotals(mode="sync", algorithm="sft", staleness_bound=0) if resumed is None else resumed.totals
    totals.data = data_counts(inputs.data)
    recorder = Recorder(config, run_dir, EventStream(), totals=totals)
    learner = LearnerClient(addresses.learner, timeout_s=config.learner.timeout_s)
    job = SFTJob(config, run_dir, inputs, learner, recorder, resumed)
    if (left := seconds_left(config)) is not None:
        asyncio.get_running_loop().call_later(left, job.stop)
    return await run_learner_alone(job.run(), learner, recorder, stop=job.stop)
