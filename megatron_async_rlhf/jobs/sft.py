"""Composition root of the controller process of `async-rlhf sft`: the warm start of a run, alone.

    start learner ─> warm start ─> export

The same learner, data and phase as in a run (`train`), without generators, so that many runs can start from one policy:
`model.hf: <run>/checkpoints/final`. An interrupted one exports nothing.
"""

import time
from pathlib import Path

from megatron_async_rlhf.config.load import load_config
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.data.prompts import PromptOrder
from megatron_async_rlhf.jobs.addresses import Addresses
from megatron_async_rlhf.jobs.inputs import RunInputs, load_run_inputs
from megatron_async_rlhf.jobs.lifecycle import export_policy, run_learner_alone
from megatron_async_rlhf.learner.client import LearnerClient
from megatron_async_rlhf.learner.protocol import Learner, Stop, WaitUntilReady
from megatron_async_rlhf.scheduler.warm_start import warm_start
from megatron_async_rlhf.telemetry.events import EventStream
from megatron_async_rlhf.telemetry.files import POLICY_TEMPLATE_DIR, RESOLVED_CONFIG
from megatron_async_rlhf.telemetry.recorder import Recorder
from megatron_async_rlhf.telemetry.summary import RunTotals


async def run_phases(
    config: RunConfig, run_dir: Path, run_inputs: RunInputs, learner: Learner, recorder: Recorder
) -> None:
    """
    Raises:
        LearnerError: a step failed, or took longer than learner.timeout_s.
    """
    steps, size = config.warm_start.steps, config.warm_start.batch_size
    began = time.time()
    recorder.phase("start")
    solvable = [prompt for prompt in run_inputs.train if prompt.index in run_inputs.solved]
    await learner.execute(WaitUntilReady())
    recorder.phase("warm start", steps=steps)
    recorder.loop_started(startup_s=time.time() - began)
    order = PromptOrder(solvable, config.run.seed)
    await warm_start(config, learner, order, run_inputs.solved, recorder)
    recorder.loop_ended()
    trained = [run_inputs.solved[prompt.index] for step in range(steps) for prompt in order.batch(step, size)]
    recorder.totals.steps = steps
    recorder.totals.train_busy_s = recorder.totals.wall_s
    recorder.totals.samples_trained = len(trained)
    recorder.totals.tokens_trained = sum(len(s.token_ids) - s.prompt_length for s in trained)
    await export_policy(config, run_dir, learner, recorder)
    await learner.execute(Stop())


async def run_job(run_dir: Path, addresses: Addresses) -> int:
    """Run all phases; returns the process's exit code. Every outcome leaves a summary."""
    config = load_config(run_dir / RESOLVED_CONFIG)
    run_inputs = load_run_inputs(config, run_dir / POLICY_TEMPLATE_DIR)
    totals = RunTotals(mode="sync", algorithm="sft", staleness_bound=0, data=run_inputs.data_counts)
    recorder = Recorder(config, run_dir, EventStream(), totals=totals)
    learner = LearnerClient(addresses.learner, timeout_s=config.learner.timeout_s)
    phases = run_phases(config, run_dir, run_inputs, learner, recorder)
    return await run_learner_alone(phases, learner, recorder)
