"""What a report needs of a run, read from its directory."""

from pathlib import Path
from typing import Any

from msgspec import Struct

from megatron_async_rlhf.config.differences import differences
from megatron_async_rlhf.config.load import load_config
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.report.samples import read_samples
from megatron_async_rlhf.report.timeline import read_timeline
from megatron_async_rlhf.telemetry.files import METRICS, check_is_run, read_steps
from megatron_async_rlhf.telemetry.summary import read_summary

Column = list[float | None]


class ReportedRun(Struct, frozen=True, kw_only=True):
    """A run, also one that is still running, has failed or was killed.

    Attributes:
        name: told apart from those of the other runs on the page.
        chosen: what its configuration has that is no default, by key.
        summary: `summary.json`; empty if there is none yet.
        metrics: of `metrics.jsonl`, a value a step; None where a step lacks it.
        held_out: by metric, `[step, value]` of each evaluation.
        timeline: see `read_timeline`.
        samples: see `read_samples`.
        notes: what is not on the page.
    """

    name: str
    directory: Path
    config: RunConfig
    chosen: dict[str, Any]
    summary: dict[str, Any]
    metrics: dict[str, Column]
    held_out: dict[str, list[tuple[int, float]]]
    timeline: dict[str, Any] | None
    samples: list[dict[str, Any]]
    notes: list[str]

    def mean(self, metric: str, share: float = 1.0) -> float | None:
        """Over the last share of the steps; None if none of them has it."""
        column = self.metrics.get(metric, [])
        known = [value for value in column[len(column) - max(1, round(share * len(column))) :] if value is not None]
        return sum(known) / len(known) if known else None


def read_reported(directory: Path, name: str) -> ReportedRun:
    """
    Raises:
        ConfigError: it is no run's directory, or no step was made yet.
        DataError: one of its files is broken.
    """
    check_is_run(directory)
    lines = read_steps(directory / METRICS)
    summary = read_summary(directory)
    if not lines:
        how = "no summary says how the run went"
        if summary:
            how = ": ".join(filter(None, (f"the run is {summary['status']}", summary["error"])))
        raise ConfigError(f"{directory}: has no steps to report; {how} (logs/ in it may say more)")
    timeline = read_timeline(directory, summary.get("wall_seconds", 0.0))
    samples, notes = read_samples(directory)
    if timeline is None:
        notes.append(f"{directory}: has no timeline; trace.json is written when a run ends")
    config = load_config(directory)
    names = dict.fromkeys(metric for line in lines for metric, value in line.items() if isinstance(value, int | float))
    return ReportedRun(
        name=name,
        directory=directory,
        config=config,
        chosen=differences(config),
        summary=summary,
        metrics={metric: [_rounded(line.get(metric)) for line in lines] for metric in names},
        held_out=_held_out(summary),
        timeline=timeline,
        samples=samples,
        notes=notes,
    )


def _rounded(value: float | None) -> float | None:
    """To what a curve can show; not numbers that count something."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _held_out(summary: dict[str, Any]) -> dict[str, list[tuple[int, float]]]:
    steps = {"before": 0, "after": summary.get("steps", 0)}
    found: dict[str, list[tuple[int, float]]] = {}
    evaluations = summary.get("eval", {})
    known = [metrics for when, metrics in evaluations.items() if when != "after"]
    for when, metrics in evaluations.items():
        if when == "after" and summary.get("algorithm") == "sft" and metrics in known:
            continue  # of an earlier step, whose policy is the one that was exported
        step = steps[when] if when in steps else int(when.removeprefix("step "))
        for metric, value in metrics.items():
            found.setdefault(metric, []).append((step, value))
    return {metric: sorted(points) for metric, points in found.items()}
