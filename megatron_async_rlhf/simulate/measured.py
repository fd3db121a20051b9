"""A scenario from a run that was: how long its completions were, and how long its steps, batches and pushes took."""

from pathlib import Path
from statistics import fmean

from msgspec import Struct

from megatron_async_rlhf.config.load import load_config
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.scheduler.recording import RolloutLog
from megatron_async_rlhf.simulate.lengths import ConstantLength, Lengths, MeasuredLengths
from megatron_async_rlhf.simulate.scenario import Speeds
from megatron_async_rlhf.telemetry.files import EVALUATIONS, METRICS, RESOLVED_CONFIG, ROLLOUT_DIR, read_lines
from megatron_async_rlhf.telemetry.summary import read_summary


class Measured(Struct, frozen=True, kw_only=True):
    """Of a finished run."""

    lengths: Lengths
    speeds: Speeds


def measure(run_dir: Path) -> Measured:
    """Lengths from what it recorded (`schedule.record`), else from its evaluations, else their mean; times from its
    summary, which counts all starts of a run that was resumed.

    A run at one load cannot tell the fixed part of a decoding step from the part of each sequence. All is taken to be of
    the sequences, which is right at the load that was measured, and optimistic for a generator with less to do.

    Raises:
        ConfigError: the run has no summary or metrics of RL steps.
    """
    summary, lines = read_summary(run_dir), read_lines(run_dir / METRICS)
    if not summary.get("tokens_generated") or not summary["weight_sync"]["count"] or not lines:
        raise ConfigError(f"--from-run {run_dir}: has no finished RL steps; give the directory of a completed run")
    config = load_config(run_dir / RESOLVED_CONFIG)
    lengths = _lengths(run_dir) or ConstantLength(max(1, round(fmean(line["response_length"] for line in lines))))
    # Every sequence takes a decoding step for each token, and one for its prompt.
    sequence_steps = (summary["tokens_generated"] + summary["samples_generated"]) / config.generator.replicas
    return Measured(
        lengths=lengths,
        speeds=Speeds(
            token_s=0.0,
            sequence_s=summary["generate_busy_seconds"] / sequence_steps,
            train_s=summary["train_busy_seconds"] / summary["steps"],
            train_token_s=0.0,
            push_s=summary["weight_sync"]["seconds_mean"],
        ),
    )


def _lengths(run_dir: Path) -> Lengths | None:
    recorded = [
        len(sequence.token_ids) - sequence.prompt_length
        for rollout in RolloutLog(run_dir / ROLLOUT_DIR).read(end=len(read_lines(run_dir / METRICS)))
        for batch in rollout.command.mini_batches
        for group in batch
        for sequence in group.sequences
    ]
    if recorded:
        return MeasuredLengths(recorded, f"the rollouts of {run_dir}")
    evaluated = [len(line["token_ids"]) for line in read_lines(run_dir / EVALUATIONS)]
    return MeasuredLengths(evaluated, f"the evaluations of {run_dir}") if evaluated else None
