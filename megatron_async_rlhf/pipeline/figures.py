"""The figures of a stage that pipeline.json repeats, each with its interval."""

import json
from pathlib import Path
from typing import Any

from megatron_async_rlhf.launch.recipe import Stage
from megatron_async_rlhf.telemetry.files import EVALUATION
from megatron_async_rlhf.telemetry.summary import read_summary

_INTERVAL = ("mean", "low", "high")


def figures_of(stage: Stage) -> dict[str, Any]:
    """Of an evaluation its win rate, of a reward model its held-out accuracy, of RL its held-out reward; nothing yet if it
    has not come that far."""
    directory = stage.config.run.path
    if stage.command == "eval":
        return _intervals(directory / EVALUATION)
    evaluations = read_summary(directory).get("eval", {})
    before, after = evaluations.get("before", {}), evaluations.get("after", {})
    if stage.command == "reward-model" and "accuracy" in after:
        ends = {end: after.get(f"accuracy_{end}") for end in ("low", "high")}
        return {"accuracy": {"mean": after["accuracy"], **ends}}
    name = {"sft": "loss", "train": "reward"}.get(stage.command, "")
    return {name: {"before": before.get(name), "after": after[name]}} if name in after else {}


def _intervals(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    found = {}
    for name, part in (("win_rate", "wins"), ("reward", "metrics")):
        figure = content.get(part, {}).get(name)
        if isinstance(figure, dict) and all(end in figure for end in _INTERVAL):
            found[name] = {end: figure[end] for end in _INTERVAL}
    return found
