"""The sweep as a picture: reward against staleness, reward against KL (figures 3 and 4 of arXiv 2410.18252)."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import numpy as np

from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.sweep.results import Group, pareto_front

_SMALLEST, _LARGEST = 5, 11  # marker sizes, points: fresh to stale


def write_plot(groups: Sequence[Group], directory: Path) -> list[Path]:
    """`sweep.svg` and `sweep.png` in `directory`; nothing if there is nothing to show.

    Left, a line per algorithm and correction: mean over seeds, the band their range. Right, a marker per group, larger
    where samples are older; the dashed line joins those that no other beats in reward at as little KL.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            "the plot needs matplotlib: pip install matplotlib; then async-rlhf sweep --report-only"
        ) from None
    if not groups:
        return []
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    lines = list(dict.fromkeys(group.line for group in groups))
    _draw_staleness(left, groups, lines)
    _draw_kl(right, groups, lines)
    figure.legend(loc="outside lower center", ncols=min(len(lines), 4))
    paths = [directory / "sweep.svg", directory / "sweep.png"]
    for path in paths:
        figure.savefig(path, dpi=150)
    return paths


def _draw_staleness(axes, groups: Sequence[Group], lines: Sequence[str]) -> None:
    axes.set_xscale("function", functions=(lambda age: np.log2(1 + age), lambda place: 2.0**place - 1))
    for number, line in enumerate(lines):
        own = sorted((group for group in groups if group.line == line), key=lambda group: group.staleness_max)
        ages = [group.staleness_max for group in own]
        axes.plot(ages, [fmean(group.rewards) for group in own], f"C{number}o-", label=line)
        axes.fill_between(
            ages,
            [min(group.rewards) for group in own],
            [max(group.rewards) for group in own],
            color=f"C{number}",
            alpha=0.15,
            linewidth=0,
        )
    before = [reward for group in groups for reward in group.rewards_before]
    if before:
        axes.axhline(fmean(before), color="grey", linestyle=":", linewidth=1)
    ages = sorted({group.staleness_max for group in groups})
    axes.set_xticks(ages, [str(age) for age in ages])
    axes.minorticks_off()
    axes.set_xlabel("staleness of the oldest sample, optimizer steps")
    axes.set_ylabel("held-out reward")


def _draw_kl(axes, groups: Sequence[Group], lines: Sequence[str]) -> None:
    oldest = max(group.staleness_max for group in groups)
    for group in groups:
        if group.kl:
            size = _SMALLEST + (_LARGEST - _SMALLEST) * (group.staleness_max / oldest if oldest else 0)
            axes.plot(
                fmean(group.kl),
                fmean(group.rewards),
                "o",
                color=f"C{lines.index(group.line)}",
                markersize=size,
                alpha=0.7,
            )
            axes.annotate(
                str(group.staleness_max),
                (fmean(group.kl), fmean(group.rewards)),
                xytext=(5, 4),
                textcoords="offset points",
                fontsize=7,
            )
    front = pareto_front(list(groups))
    axes.plot([fmean(g.kl) for g in front], [fmean(g.rewards) for g in front], "k--", linewidth=1)
    axes.set_xlabel("KL to the reference at the end, nats (numbers: staleness)")
    axes.set_ylabel("held-out reward")
