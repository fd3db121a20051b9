"""Rewards of a pipeline's RL stages as a picture: what is trained on beside what is meant, so that over-optimisation shows."""

from pathlib import Path
from typing import Any

from megatron_async_rlhf.launch.recipe import Recipe
from megatron_async_rlhf.telemetry.files import METRICS, read_steps

PLOT = "rewards.png"
_PART, _KL = "reward/", "kl_to_reference"


def write_plot(recipe: Recipe) -> Path | None:
    """`rewards.png` in the pipeline's directory: each part of the reward by step and by KL, a column per RL stage.

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
    figure = Figure(figsize=(4.5 * len(runs), 7.5), layout="constrained")
    for column, (name, lines) in enumerate(runs.items()):
        steps, kl = (
            figure.add_subplot(2, len(runs), column + 1),
            figure.add_subplot(2, len(runs), len(runs) + column + 1),
        )
        for part in sorted(key for key in lines[0] if key.startswith(_PART)):
            label = part.removeprefix(_PART)
            steps.plot([line["step"] for line in lines], [line[part] for line in lines], label=label)
            kl.plot([line.get(_KL) for line in lines], [line[part] for line in lines], ".", label=label)
        steps.set(title=name, xlabel="optimizer step", ylabel="mean reward of the step's completions")
        kl.set(xlabel="KL to the reference, nats", ylabel="mean reward of the step's completions")
        steps.legend()
    path = recipe.directory / PLOT
    figure.savefig(path, dpi=120)
    return path


def _lines(run: Path) -> list[dict[str, Any]]:
    """The steps of a run whose reward has parts."""
    lines = read_steps(run / METRICS)
    return lines if lines and sum(key.startswith(_PART) for key in lines[0]) > 1 else []
