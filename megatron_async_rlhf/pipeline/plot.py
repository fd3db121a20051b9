"""Rewards of a pipeline's RL stages as a picture: what is trained on beside what is meant, so that over-optimisation shows."""

from pathlib import Path
from typing import Any

from megatron_async_rlhf.launch.recipe import Recipe
from megatron_async_rlhf.telemetry.files import METRICS, read_steps

PLOT = "rewards.png"
_PART, _KL = "reward/", "kl_to_reference"


def write_plot(recipe: Recipe) -> Path | None:
    """`rewards.png` in the pipeline's directory: a row for each part of the reward, by step and by KL, of all RL stages.

    Nothing without a stage whose reward has two parts or more, or without matplotlib, which not every machine has.
    """
    runs = {
        stage.name: lines
        for stage in recipe.stages
        if stage.command == "train"
        if (lines := _lines(stage.config.run.path))
    }
    if not runs:
        return None
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    parts = sorted({key for lines in runs.values() for key in lines[0] if key.startswith(_PART)})
    figure = Figure(figsize=(9, 3.5 * len(parts)), layout="constrained")
    axes = figure.subplots(len(parts), 2, sharey="row")
    for part, (by_step, by_kl) in zip(parts, axes, strict=True):
        for name, lines in runs.items():
            rewards = [line.get(part) for line in lines]  # None leaves a gap
            by_step.plot([line["step"] for line in lines], rewards, label=name)
            by_kl.plot([line.get(_KL) for line in lines], rewards, ".", label=name)
        by_step.set_ylabel(part)
    axes[0, 0].legend()
    axes[-1, 0].set_xlabel("optimizer step")
    axes[-1, 1].set_xlabel("KL to the reference, nats")
    figure.suptitle("Mean rewards of each step's completions")
    path = recipe.directory / PLOT
    figure.savefig(path, dpi=120)
    return path


def _lines(run: Path) -> list[dict[str, Any]]:
    """The steps of a run whose reward has parts."""
    lines = read_steps(run / METRICS)
    return lines if lines and sum(key.startswith(_PART) for key in lines[0]) > 1 else []
