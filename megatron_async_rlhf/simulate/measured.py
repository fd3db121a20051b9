"""A scenario from a run that was: how long its completions were, and how long its steps, batches and pushes took."""

from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from msgspec import Struct, ValidationError
from msgspec.structs import replace

from megatron_async_rlhf.config.load import load_config
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.estimate.machines import machine_of
from megatron_async_rlhf.scheduler.recording import RolloutLog
from megatron_async_rlhf.simulate.lengths import ConstantLength, Lengths, MeasuredLengths
from megatron_async_rlhf.simulate.prediction import alone, predict
from megatron_async_rlhf.simulate.scenario import Scenario, Speeds
from megatron_async_rlhf.telemetry.files import (
    EVALUATIONS,
    METRICS,
    RESOLVED_CONFIG,
    ROLLOUT_DIR,
    SUMMARY,
    read_lines,
    read_steps,
)
from megatron_async_rlhf.telemetry.summary import RunFigures, read_figures


class Measured(Struct, frozen=True, kw_only=True):
    """Of a run.

    Attributes:
        config: it ran with, and as many steps as it made.
        figures: of its RL loop, from its summary.
    """

    config: RunConfig
    lengths: Lengths
    speeds: Speeds
    figures: RunFigures

    def known_error(self, scenario: Scenario) -> str:
        """How far a simulation of what the run did itself, on the scenario made of it, is off."""
        own = replace(scenario, generators=self.config.generator.replicas)
        simulated = predict(self.config, own).schedule.totals.wall_s
        off = simulated / self.figures.wall_seconds - 1
        return (
            f"known error: this run itself, simulated, takes {simulated:.1f} s; measured were {self.figures.wall_seconds:.1f} s "
            f"({abs(off):.0%} too {'fast' if off < 0 else 'slow'})"
        )


def measure(run_dir: Path) -> Measured:
    """Lengths from what it recorded (`schedule.record`), else from its evaluations, else their mean; times from its
    summary, which counts all starts of a run that was resumed.

    A run at one load cannot tell the fixed part of a decoding step from the part of each sequence. All is taken to be of
    the sequences, which is right at the load that was measured, and optimistic for a generator with less to do. Sides that
    worked at once on one machine slowed each other down: that is taken out, for the schedule where they take turns.

    Raises:
        ConfigError: the run has no summary or metrics of RL steps.
    """
    lines, nothing = read_steps(run_dir / METRICS), f"--from-run {run_dir}: has no finished RL steps"
    try:
        summary = read_figures(run_dir)
    except ValidationError as error:
        raise ConfigError(f"{nothing} ({SUMMARY}: {error}); give the directory of a completed run") from None
    if not (summary.tokens_generated and summary.weight_sync.count and lines):
        raise ConfigError(f"{nothing}; give the directory of a completed run")
    config = load_config(run_dir / RESOLVED_CONFIG)
    # Every sequence takes a decoding step for each token, and one for its prompt.
    sequence_steps = (summary.tokens_generated + summary.samples_generated) / config.generator.replicas
    generate_s, train_s = summary.generate_busy_seconds, summary.train_busy_seconds
    machine = machine_of(config)
    speeds = Speeds(
        token_s=0.0,
        sequence_s=generate_s / sequence_steps,
        train_s=train_s / summary.steps,
        train_token_s=0.0,
        push_s=summary.weight_sync.seconds_mean,
        contention=machine.contention + machine.host_contention,  # at most, as with small models
        jitter=_jitter(config, lines),
    )
    if summary.max_staleness != 0:
        speeds = alone(speeds, generate_s, train_s)
    tree = config.model_dump()
    made = RunConfig.model_validate(tree | {"schedule": tree["schedule"] | {"steps": summary.steps}})
    return Measured(config=made, lengths=_lengths(run_dir, summary, lines), speeds=speeds, figures=summary)


def _jitter(config: RunConfig, lines: list[dict[str, Any]]) -> float:
    """Of a rollout's time in the learner; where the next batch is sampled meanwhile, of the difference of both times,
    which is what the two sides wait for each other because of it."""
    updates = config.schedule.updates_per_rollout
    trained = [updates * line["time/train_s"] for line in lines[::updates]]
    differences = trained
    if config.schedule.generation == "batch" and config.schedule.staleness_bound != 0:
        sampled = [line["time/generate_s"] for line in lines[::updates]]
        differences = [train - generate for train, generate in zip(trained, sampled[1:], strict=False)]
    return pstdev(differences) / fmean(trained) if len(differences) > 1 and any(trained) else 0.0


def _lengths(run_dir: Path, summary: RunFigures, lines: list[dict[str, Any]]) -> Lengths:
    """With the mean of all that the run generated: of a prompt's completions only those that were trained on are recorded,
    and held-out ones may be sampled at another temperature."""
    complete = summary.samples_generated - summary.samples_cancelled
    mean = summary.tokens_generated / complete
    recorded = [
        len(sequence.token_ids) - sequence.prompt_length
        for rollout in RolloutLog(run_dir / ROLLOUT_DIR).read(end=len(lines))
        for batch in rollout.command.mini_batches
        for group in batch
        for sequence in group.sequences
    ]
    if recorded:
        return MeasuredLengths(recorded, f"the rollouts of {run_dir}", mean)
    evaluated = [len(line["token_ids"]) for line in read_lines(run_dir / EVALUATIONS)]
    if evaluated:
        return MeasuredLengths(evaluated, f"the evaluations of {run_dir}", mean)
    return ConstantLength(max(1, round(mean)))
