"""What a run that was tells a plan: lengths of prompts and completions, and how far off the estimated speeds were there.

The run may have had another layout and other numbers of samples; the same model on the same kind of device is best.
"""

from pathlib import Path
from statistics import fmean, median
from typing import Any

from msgspec import Struct

from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.estimate.speed import Factors
from megatron_async_rlhf.estimate.speed import Lengths as MeanLengths
from megatron_async_rlhf.jobs.inputs import resolve_architecture
from megatron_async_rlhf.simulate.lengths import Lengths
from megatron_async_rlhf.simulate.measured import measure
from megatron_async_rlhf.simulate.prediction import estimated_scenario, predict, sized
from megatron_async_rlhf.telemetry.files import METRICS, POLICY_TEMPLATE_DIR, read_steps


class Calibration(Struct, frozen=True, kw_only=True):
    """
    Attributes:
        lengths: on average.
        completions: how long they were, not only on average.
        source: for who reads the figures.
    """

    lengths: MeanLengths
    completions: Lengths
    factors: Factors
    source: str


def calibrate(run_dir: Path, where: str = "") -> Calibration:
    """
    Args:
        where: it was measured, for who reads the figures; default: in this directory.

    Raises:
        ConfigError: the run has no finished RL steps.
    """
    measured = measure(run_dir)
    config = measured.config
    arch = resolve_architecture(config, run_dir / POLICY_TEMPLATE_DIR)[0]
    lines = [line for line in read_steps(run_dir / METRICS) if line.get("num_sequences")]
    if not lines:
        raise ConfigError(f"--from-run {run_dir}: none of its steps trained on anything")
    tokens, sequences = (fmean(line[key] for line in lines) for key in ("tokens", "num_sequences"))
    completion = fmean(line["response_length"] for line in lines)
    # A shared prompt is among the tokens once.
    prompts = sequences / config.algorithm.trained_samples if config.learner.share_prompts else sequences
    lengths = max(1.0, (tokens - sequences * completion) / prompts), max(1.0, completion)
    # The run itself on the estimated machine, with all that makes it longer than its parts: stragglers, cache made again.
    scenario, speed = estimated_scenario(config, arch, lengths, completions=measured.lengths)
    own, took = predict(sized(config), scenario).schedule.totals, measured.figures
    factors = Factors(
        # Of all pairs, some of which are skipped because they tie.
        train=_steady(lines) * (took.train_busy_seconds / took.steps) / (own.train_busy_s / own.steps),
        generate=(took.generate_busy_seconds / took.steps) / (own.generate_busy_s / own.steps),
        push=measured.speeds.push_s / speed.push_s,
    )
    return Calibration(
        lengths=lengths,
        completions=measured.lengths,
        factors=factors,
        source=f"as measured {where or f'in {run_dir}'}: training {factors.train:.2f}, generation {factors.generate:.2f} and pushes "
        f"{factors.push:.2f} times as long as estimated there",
    )


def _steady(lines: list[dict[str, Any]]) -> float:
    """What a usual step takes in the learner, as a share of the mean: the first ones take longer, and a short run has few others."""
    seconds = [line["time/train_s"] for line in lines]
    return median(seconds) / fmean(seconds) if any(seconds) else 1.0
