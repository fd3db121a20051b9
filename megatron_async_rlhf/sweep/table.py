"""A sweep on the terminal: what it consists of, and what came out so far."""

from collections.abc import Sequence
from statistics import fmean

from rich.console import Console
from rich.table import Table

from megatron_async_rlhf.launch.progress import progress_of
from megatron_async_rlhf.sweep.points import Point, Sweep
from megatron_async_rlhf.sweep.results import Group, PointResult


def print_points(console: Console, sweep: Sweep, points: Sequence[Point]) -> None:
    """Every run, in the order they would start."""
    table = Table("#", "run", "steps", "samples a step", "status")
    start = sweep.warm_start
    if start is not None:
        keys = start.warm_start
        table.add_row("", start.run.path.name, str(keys.steps), str(keys.batch_size), progress_of(start).status)
    for number, point in enumerate(points, 1):
        schedule, samples = point.config.schedule, point.config.algorithm.samples_per_prompt
        a_step = f"{schedule.prompts_per_step} x {samples}"
        table.add_row(str(number), point.name, str(schedule.steps), a_step, progress_of(point.config).status)
    console.print(table)


def print_groups(console: Console, groups: Sequence[Group]) -> None:
    """Means over seeds, with the range in brackets."""
    numbers = ("before", "reward", "KL", "staleness", "s")
    table = Table(
        "line",
        "point",
        "seeds",
        caption="means over seeds, their range in brackets; staleness: mean / max; s: of the RL loop",
    )
    for column in numbers:
        table.add_column(column, justify="right")
    for cells in group_rows(groups):
        table.add_row(*cells)
    console.print(table)


def group_rows(groups: Sequence[Group]) -> list[list[str]]:
    """Line, point, seeds, held-out reward before and after, KL, staleness, seconds of the RL loop."""
    return [
        [
            group.line,
            group.staleness,
            f"{len(group.rewards)}/{group.points}",
            _mean(group.rewards_before),
            _range(group.rewards),
            _range(group.kl),
            f"{group.staleness_mean:.2f} / {group.staleness_max}",
            f"{group.seconds:.0f}",
        ]
        for group in groups
    ]


def print_unfinished(console: Console, results: Sequence[PointResult]) -> None:
    """A line for each failed point, one for the number of the others."""
    for result in results:
        if result.status == "failed":
            console.print(f"{result.name}: failed: {result.error}", markup=False)
    left = sum(result.status not in ("completed", "failed") for result in results)
    if left:
        console.print(f"{left} of {len(results)} points have no result yet")


def _mean(values: Sequence[float]) -> str:
    return f"{fmean(values):.3f}" if values else "-"


def _range(values: Sequence[float]) -> str:
    if len(values) < 2:
        return _mean(values)
    return f"{_mean(values)} [{min(values):.3f}, {max(values):.3f}]"
