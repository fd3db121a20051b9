"""Composition root of the controller process of `async-rlhf reward-model`: a reward model from preference pairs.

    start learner ─> accuracy on held-out pairs ─> steps ─> accuracy on held-out pairs ─> export
                                                    └─ the same on the way

An interrupted stage exports nothing.
"""

from pathlib import Path

from megatron_async_rlhf.algorithms.calibration import pair_figures
from megatron_async_rlhf.clock import now
from megatron_async_rlhf.config.load import load_config
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.jobs.addresses import Addresses
from megatron_async_rlhf.jobs.inputs import data_counts
from megatron_async_rlhf.jobs.lifecycle import export_policy, release_learner, run_learner_alone
from megatron_async_rlhf.jobs.pair_inputs import PairInputs, load_pair_inputs
from megatron_async_rlhf.learner.client import LearnerClient
from megatron_async_rlhf.learner.protocol import Learner, ScoreRewards, StartPairs, TrainPairs, WaitUntilReady
from megatron_async_rlhf.telemetry.events import EventStream
from megatron_async_rlhf.telemetry.files import POLICY_TEMPLATE_DIR, RESOLVED_CONFIG
from megatron_async_rlhf.telemetry.recorder import Recorder
from megatron_async_rlhf.telemetry.summary import RunTotals

_SCORED_TOGETHER = 256  # pairs of one command


class RewardModelJob:
    """One stage, seen from the controller process."""

    def __init__(
        self, config: RunConfig, run_dir: Path, inputs: PairInputs, learner: Learner, recorder: Recorder
    ) -> None:
        self._config, self._keys, self._run_dir, self._inputs = config, config.reward_modelling, run_dir, inputs
        self._learner, self._recorder = learner, recorder

    async def run(self) -> None:
        """All phases.

        Raises:
            LearnerError: a step failed, or took longer than learner.timeout_s.
        """
        began, recorder, steps = now(), self._recorder, len(self._inputs.batches)
        recorder.phase("start")
        await self._learner.execute(WaitUntilReady())
        await self._learner.execute(StartPairs(steps=steps))
        await self._evaluate("before", step=0)
        recorder.phase("train", steps=steps)
        recorder.loop_started(startup_s=now() - began)
        for step in range(1, steps + 1):
            await self._train(step)
            if self._keys.eval_every is not None and step % self._keys.eval_every == 0:
                await self._evaluate(f"step {step}", step=step)
        recorder.loop_ended()
        await self._evaluate("after", step=steps)
        await export_policy(self._config, self._run_dir, self._learner, recorder)
        await release_learner(self._learner, recorder)

    async def _train(self, step: int) -> None:
        pairs = [self._inputs.train.rows[row] for row in self._inputs.batches[step - 1]]
        answer = await self._learner.execute(TrainPairs(step=step, pairs=pairs))
        assert answer.metrics is not None  # which is what the command was for
        self._recorder.totals.tokens_trained += sum(len(pair.chosen) + len(pair.rejected) for pair in pairs)
        self._recorder.supervised_step(
            step, len(self._inputs.batches), answer.metrics.values, 2 * len(pairs), answer.spans
        )

    async def _evaluate(self, when: str, *, step: int) -> None:
        """Accuracy, calibration and the distribution of rewards on the held-out pairs, if there are any."""
        pairs, start = self._inputs.held_out, now()
        if not pairs:
            return
        rewards: list[float] = []
        for first in range(0, len(pairs), _SCORED_TOGETHER):
            part = pairs[first : first + _SCORED_TOGETHER]
            command = ScoreRewards(sequences=[side for pair in part for side in (pair.chosen, pair.rejected)])
            rewards += (await self._learner.execute(command)).rewards
        self._recorder.evaluated(
            when,
            pair_figures(rewards[0::2], rewards[1::2]),
            start,
            now(),
            version=step,
            samples=len(rewards),
            tokens=sum(len(pair.chosen) + len(pair.rejected) for pair in pairs),
        )


async def run_job(run_dir: Path, addresses: Addresses) -> int:
    """Run all phases; returns the process's exit code. Every outcome leaves a summary."""
    config = load_config(run_dir / RESOLVED_CONFIG)
    inputs = load_pair_inputs(config, run_dir / POLICY_TEMPLATE_DIR)
    totals = RunTotals(mode="sync", algorithm="reward_model", staleness_bound=0, data=data_counts(inputs.data))
    recorder = Recorder(config, run_dir, EventStream(), totals=totals)
    learner = LearnerClient(addresses.learner, timeout_s=config.learner.timeout_s)
    job = RewardModelJob(config, run_dir, inputs, learner, recorder)
    return await run_learner_alone(job.run(), learner, recorder)
