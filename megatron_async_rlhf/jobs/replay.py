"""Composition root of the controller process of `async-rlhf replay`: trains again on what a run has recorded.

    start learner ─> warm start ─> reference ─> recorded rollouts, one after another ─> export

No generator, no rewards, no schedule: what reaches the learner is what reached it then, in the same order, so losses and
weights come out with the same bits. What a run was on a cluster can be looked into on one machine, step by step.

    start learner ─> load checkpoint ─> the rollout whose loss was not finite          (`--failed`)
"""

from collections import Counter
from pathlib import Path
from statistics import fmean

from megatron_async_rlhf.clock import now
from megatron_async_rlhf.config.load import load_config
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import NonFiniteLossError, ReplayError
from megatron_async_rlhf.jobs.addresses import Addresses
from megatron_async_rlhf.jobs.inputs import RunInputs, data_counts, load_run_inputs
from megatron_async_rlhf.jobs.lifecycle import (
    begin_reinforcement,
    export_policy,
    release_learner,
    resume_reinforcement,
    run_learner_alone,
)
from megatron_async_rlhf.learner.client import LearnerClient
from megatron_async_rlhf.learner.protocol import (
    Answer,
    Learner,
    WaitUntilReady,
    rollout_span,
)
from megatron_async_rlhf.scheduler.recording import RecordedRollout, RolloutLog
from megatron_async_rlhf.telemetry.events import EventStream
from megatron_async_rlhf.telemetry.files import (
    FAILED_ROLLOUT,
    METRICS,
    POLICY_TEMPLATE_DIR,
    RESOLVED_CONFIG,
    ROLLOUT_DIR,
    read_steps,
)
from megatron_async_rlhf.telemetry.recorder import Recorder

_SAME_MACHINE = "layout, precision, threads, versions of packages and the kind of processor must be those of the run"
# Of an optimizer step, what must come out again to the last bit, and why it may not.
_SAME = {
    "learning_rate": "the run was resumed with other schedule.steps or rates, which a replay from the start does not follow",
    "loss": _SAME_MACHINE,
    "grad_norm": _SAME_MACHINE,
}


async def run_phases(
    config: RunConfig, run_dir: Path, recorded: Path, run_inputs: RunInputs, learner: Learner, recorder: Recorder
) -> None:
    """Of a replay from the start.

    Raises:
        ReplayError: a step came out differently.
    """
    began = now()
    recorder.phase("start")
    await learner.execute(WaitUntilReady())
    await begin_reinforcement(config, learner, run_inputs, recorder)
    before = {line["step"]: line for line in read_steps(recorded / METRICS)}
    recorder.phase("train", steps=config.schedule.steps)
    recorder.loop_started(startup_s=now() - began)
    for rollout in RolloutLog(recorded / ROLLOUT_DIR).read(end=len(before)):
        start = now()
        answer = await learner.execute(rollout.command)
        recorder.learner_was_busy(rollout_span(rollout.command, start, now()), answer.spans)
        _report(rollout, answer, recorder, before)
    recorder.loop_ended()
    await export_policy(config, run_dir, learner, recorder)
    await release_learner(learner, recorder)


async def run_failed(config: RunConfig, recorded: Path, learner: Learner, recorder: Recorder) -> None:
    """Train once more on the rollout whose loss was not finite, from the state before it.

    Raises:
        ReplayError: the loss is finite.
    """
    began, rollout = now(), RecordedRollout.read(recorded / FAILED_ROLLOUT)
    recorder.phase("start")
    await learner.execute(WaitUntilReady())
    await resume_reinforcement(config, recorded, rollout.command.version, learner, recorder)
    recorder.phase("train", steps=1)
    recorder.loop_started(startup_s=now() - began)
    try:
        answer = await learner.execute(rollout.command)
    except NonFiniteLossError as error:
        recorder.note(f"it came again: {error}")
        await release_learner(learner, recorder)
        return
    raise ReplayError(
        f"step {rollout.command.version + 1}: the loss was not finite and is {answer.steps[0].values['loss']} now; {_SAME_MACHINE}"
    )


def _report(rollout: RecordedRollout, answer: Answer, recorder: Recorder, before: dict[int, dict]) -> None:
    """Write the steps of a rollout down, and compare them with the ones `before`."""
    batches = rollout.command.mini_batches
    versions = [v for group in rollout.groups for completion in group.versions for v in completion]
    for update, step in enumerate(answer.steps):
        version, groups = rollout.command.version + update, batches[update % len(batches)]
        number = version + 1
        rewards = [reward for group in groups for reward in group.rewards]
        samples = sum(len(group.sequences) for group in groups)
        if update < len(batches):
            recorder.trained(samples, samples, 0)
        recorder.stepped(
            Counter(), sum(len(s.token_ids) - s.prompt_length for group in groups for s in group.sequences)
        )
        staleness = version - fmean(versions) if versions else 0.0
        values = {"reward": fmean(rewards) if rewards else 0.0, "staleness/mean": staleness, **step.values}
        recorder.step(number, values)
        for name, reason in _SAME.items():
            then, this = before.get(number, {}).get(name), step.values.get(name)
            if then != this:
                raise ReplayError(f"step {number}: {name} was {then} and is {this}; {reason}")


async def run_job(run_dir: Path, addresses: Addresses, recorded: Path, *, failed: bool) -> int:
    """Run all phases; returns the process's exit code. Every outcome leaves a summary."""
    config = load_config(run_dir / RESOLVED_CONFIG)
    run_inputs = load_run_inputs(config, run_dir / POLICY_TEMPLATE_DIR)
    recorder = Recorder(config, run_dir, EventStream())
    recorder.totals.data = data_counts(run_inputs.data)
    learner = LearnerClient(addresses.learner, timeout_s=config.learner.timeout_s)
    if failed:
        phases = run_failed(config, recorded, learner, recorder)
    else:
        phases = run_phases(config, run_dir, recorded, run_inputs, learner, recorder)
    return await run_learner_alone(phases, learner, recorder)
