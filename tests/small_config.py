"""The smallest configuration that is a run's, with some of its keys changed."""

from pathlib import Path
from typing import Any

from megatron_async_rlhf.config.root import RunConfig

SECTIONS: dict[str, dict[str, Any]] = {
    "model": {"layers": 2, "hidden_size": 64, "ffn_size": 96, "heads": 2, "context_length": 96},
    "generator": {"max_new_tokens": 12},
    "data": {"train_prompts": 32, "eval_prompts": 4},
}


def small_config(directory: Path, seed: int, *changes: dict[str, dict[str, Any]]) -> RunConfig:
    """Of a run in `directory`; later changes go over earlier ones."""
    tree: dict[str, dict[str, Any]] = {}
    for sections in (SECTIONS, *changes):
        for name, keys in sections.items():
            tree[name] = tree.get(name, {}) | keys
    return RunConfig.model_validate(tree | {"run": {"dir": str(directory), "seed": seed}})
