"""What `async-rlhf simulate` says: an asynchronous schedule next to the synchronous one of the same sizes."""

from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.simulate.prediction import Prediction
from megatron_async_rlhf.simulate.simulation import Outcome
from megatron_async_rlhf.telemetry.summary import staleness_figures


def to_json(config: RunConfig, steps: int, prediction: Prediction, known_error: str) -> dict[str, Any]:
    """Both outcomes with the same keys, and the ratio of their times.

    Args:
        config: what was simulated, of a run of so many `steps`.
    """
    return {
        "generators": prediction.scenario.generators,
        "steps": config.schedule.steps,
        "of_steps": steps,
        "lengths": prediction.scenario.lengths.name,
        "schedule": facts(prediction.schedule),
        "synchronous": facts(prediction.synchronous),
        "speedup": prediction.speedup,
        "verdict": prediction.verdict,
        "known_error": known_error,
    }


def facts(outcome: Outcome) -> dict[str, Any]:
    """Of one run: seconds, and shares of its wall clock."""
    totals = outcome.totals
    wall = totals.wall_s or 1.0
    return {
        "wall_seconds": totals.wall_s,
        "step_seconds": outcome.step_s,
        "generate_busy": totals.generate_busy_s / wall,
        "train_busy": totals.train_busy_s / wall,
        "overlap_efficiency": max(totals.generate_busy_s, totals.train_busy_s) / wall,
        "decoding": outcome.decoding,
        "frozen": outcome.frozen,
        "sequences_at_once": outcome.at_once,
        "samples_per_second": totals.samples_generated / wall,
        "samples": totals.samples_generated,
        "samples_cancelled": totals.samples_cancelled,
        "tokens_generated": totals.tokens_generated,
        "pushes": totals.push_s.count,
        "push_seconds": totals.push_s.total,
        "staleness": staleness_figures(totals.staleness),
    }


_ROWS = [
    ("virtual wall clock", "wall_seconds", "{:.1f} s"),
    ("a step, once under way", "step_seconds", "{:.2f} s"),
    ("samples per second", "samples_per_second", "{:.2f}"),
    ("generators busy (any of them)", "generate_busy", "{:.1%}"),
    ("learner busy", "train_busy", "{:.1%}"),
    ("overlap efficiency", "overlap_efficiency", "{:.3f}"),
    ("a generator decodes", "decoding", "{:.1%}"),
    ("a generator is frozen by pushes", "frozen", "{:.1%}"),
    ("sequences it decodes at once", "sequences_at_once", "{:.1f}"),
    ("weight pushes", "pushes", "{}"),
    ("samples given up", "samples_cancelled", "{}"),
]


def show(console: Console, report: dict[str, Any]) -> None:
    """As a table."""
    of = f" of {report['of_steps']}" if report["of_steps"] > report["steps"] else ""
    table = Table(title=f"{report['steps']}{of} steps on {report['generators']} generators; {report['lengths']}")
    for column in ("", "this schedule", "synchronous"):
        table.add_column(column, justify="left" if not column else "right")
    sides = [report["schedule"], report["synchronous"]]
    for name, key, form in _ROWS:
        table.add_row(name, *(form.format(side[key]) for side in sides))
    table.add_section()
    tokens = [sum(side["staleness"]["histogram"].values()) or 1 for side in sides]
    table.add_row("staleness, mean of all tokens", *(f"{side['staleness']['mean']:.2f}" for side in sides))
    for age in sorted({int(age) for side in sides for age in side["staleness"]["histogram"]}):
        shares = [side["staleness"]["histogram"].get(str(age), 0) / n for side, n in zip(sides, tokens, strict=True)]
        table.add_row(f"  {age} steps", *(f"{share:.1%}" if share else "" for share in shares))
    console.print(table)
    console.print(report["verdict"], soft_wrap=True)
    console.print(report["known_error"], soft_wrap=True)
