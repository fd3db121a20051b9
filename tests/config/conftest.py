import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from megatron_async_rlhf.config.load import load_config
from megatron_async_rlhf.config.root import RunConfig

MINIMAL = {"model": {"layers": 4, "hidden_size": 128, "ffn_size": 96, "heads": 4, "context_length": 96}}


@pytest.fixture
def minimal() -> dict:
    return copy.deepcopy(MINIMAL)


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., RunConfig]:
    """Writes the minimal config with `sections` merged in, then loads it with overrides."""

    def load(*overrides: str, **sections: dict | None) -> RunConfig:
        tree = copy.deepcopy(MINIMAL)
        for name, keys in sections.items():
            tree[name] = tree.get(name, {}) | keys if isinstance(keys, dict) else keys
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(tree))
        return load_config(path, overrides)

    return load
