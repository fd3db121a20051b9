import copy
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_async_rlhf.sweep.points import Sweep, expand

BASE = {
    "model": {"layers": 2, "hidden_size": 64, "ffn_size": 96, "heads": 2, "context_length": 96},
    "warm_start": {"steps": 5},
    "schedule": {"mode": "sync", "steps": 8},
    "generator": {"max_new_tokens": 12},
    "data": {"train_prompts": 32, "eval_prompts": 8},
}
AXES = {
    "algorithm": {"dpo": {"algorithm.type": "online_dpo"}, "rloo": {"algorithm": {"type": "proximal_rloo"}}},
    "updates": {"schedule.mini_batches": [1, 4]},
    "seed": {"run.seed": [0, 1]},
}


@pytest.fixture
def tree(tmp_path: Path) -> Callable[..., dict]:
    """Sections of a small sweep; those given replace its own, `sweep` is merged."""

    def tree(sweep: dict = {}, **sections: dict) -> dict:
        return copy.deepcopy(
            BASE | {"run": {"dir": str(tmp_path / "sweep")}} | sections | {"sweep": {"axes": AXES} | sweep}
        )

    return tree


@pytest.fixture
def make(tree) -> Callable[..., Sweep]:
    def make(sweep: dict = {}, **sections: dict) -> Sweep:
        return expand(tree(sweep, **sections))

    return make
