"""The comparison as a picture: reward by samples, reward by time, and what each side did with its time."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_async_rlhf.compare.comparison import Comparison
from megatron_async_rlhf.compare.runs import WINDOW, ComparedRun
from megatron_async_rlhf.errors import ConfigError

_COLOURS = {"async": "C0", "same_split": "C1", "alternating": "C2"}
_LABELS = {"async": "async", "same_split": "sync, same split", "alternating": "sync, alternating"}
_POINTS = 200  # of a curve


def draw(comparison: Comparison):
    """A matplotlib figure: thin lines are runs, thick ones their means.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            "the picture needs matplotlib: pip install matplotlib; then give the same command again"
        ) from None
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    axes: Any = figure.subplot_mosaic([["samples", "time"], ["sides", "sides"]], height_ratios=[3, 2])
    by_samples, by_time = axes["samples"], axes["time"]
    for name in comparison.schedules:
        runs = [run for run in comparison.runs if run.schedule == name]
        _curves(by_samples, name, runs, [_samples(run) for run in runs])
        _curves(by_time, name, runs, [[moment.seconds for moment in run.course] for run in runs])
    by_samples.set_xlabel("completions generated for training")
    by_time.set_xlabel("seconds of the RL loop")
    by_samples.set_ylabel(f"reward in training (over {WINDOW:.0%} of the steps)")
    by_samples.legend()
    _bars(axes["sides"], comparison)
    return figure


def _samples(run: ComparedRun) -> list[float]:
    return [run.samples * moment.step / run.steps for moment in run.course]


def _curves(axes, name: str, runs: Sequence[ComparedRun], places: Sequence[Sequence[float]]) -> None:
    colour = _COLOURS[name]
    smooth = [[run.reward_after(steps) for steps in range(1, len(run.course) + 1)] for run in runs]
    for at, rewards in zip(places, smooth, strict=True):
        axes.plot(at, rewards, color=colour, linewidth=0.8, alpha=0.4)
    grid = np.linspace(max(at[0] for at in places), min(at[-1] for at in places), _POINTS)
    mean = np.mean([np.interp(grid, at, rewards) for at, rewards in zip(places, smooth, strict=True)], axis=0)
    axes.plot(grid, mean, color=colour, linewidth=2, label=_LABELS[name])


def _bars(axes, comparison: Comparison) -> None:
    """Of each side and schedule: at work, and idle, in seconds of a step."""
    labels, place = [], 0.0
    for name, figures in reversed(comparison.schedules.items()):
        step = figures.step_seconds.mean
        for side, busy in (("generators", figures.generate_seconds.mean), ("learner", figures.train_seconds.mean)):
            axes.barh(place, step, color="lightgrey")
            axes.barh(place, busy, color=_COLOURS[name])
            axes.text(step, place, f" idle {max(0.0, 1 - busy / step):.0%}", va="center")
            labels.append((place, f"{_LABELS[name]}: {side}"))
            place += 1.0
        place += 0.5
    axes.set_yticks([at for at, label in labels], [label for at, label in labels])
    axes.set_xlabel("seconds of a step (coloured: at work)")
    axes.margins(x=0.12)
