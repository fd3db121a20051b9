"""Which keys a resumed run must share with the run it continues with."""

import re
from collections.abc import Sequence
from typing import Any

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.config.section import shown
from megatron_async_rlhf.errors import ConfigError

# What is saved would mean something else under another value: weights, optimizer, prompt order, scored batches. Layout,
# rates, steps, transport and telemetry may change.
_FIXED = (
    "run.seed", "model", "warm_start", "sft", "reward_model", "data", "reward", "algorithm", "generator.temperature",
    "learner.precision", "schedule.mode", "schedule.max_staleness", "schedule.prompts_per_step", "schedule.mini_batches", "schedule.epochs",
    "schedule.generation",
)  # fmt: skip


# Where prompts and weights are read. They may lie elsewhere now, as long as the contents are known to be the same.
# A reward model may be one of several rewards (`reward.0.model`).
_PLACES = ("data.train", "data.eval", "model.hf", "reward.model")
# The default until columns were recognised: nothing has changed as long as the same prompts come of it.
_FORMER_DEFAULT = {"data.prompt_field": "prompt"}
_NUMBER = re.compile(r"\.\d+(?=\.)")

# The same of an evaluation: what its answers and scores are.
FIXED_OF_EVALUATION = (
    "run.seed", "model", "data", "reward", "eval", "generator.max_new_tokens", "generator.dtype",
)  # fmt: skip


def check_same_run(
    earlier: RunConfig, now: RunConfig, *, contents_are_compared: bool = False, fixed: Sequence[str] = _FIXED
) -> None:
    """Refuse to continue under another configuration.

    Args:
        fixed: keys that must not change.
        contents_are_compared: by digests of what is read (`launch.input_digests`), so that its path does not matter.

    Raises:
        ConfigError: one line naming the first key that differs, and both values.
    """
    before, after = _leaves(_comparable(earlier)), _leaves(_comparable(now))
    for key in (*before, *after):
        is_place = _NUMBER.sub("", key) in _PLACES
        if contents_are_compared and is_place and None not in (before.get(key), after.get(key)):
            continue
        is_former_default = before.get(key) == _FORMER_DEFAULT.get(key) and after.get(key) is None
        if contents_are_compared and is_former_default:
            continue
        if any(key == one or key.startswith(f"{one}.") for one in fixed) and before.get(key) != after.get(key):
            raise ConfigError(
                f"{key} = {shown(after.get(key))}: the run in {now.run.path} was started with {shown(before.get(key))}; "
                "set that again, or start another run without --resume"
            )


def _comparable(config: RunConfig) -> dict[str, Any]:
    """The configuration without what only says how a reward is computed: the same completion earns the same."""
    tree = config.model_dump(mode="json")
    entries = tree["reward"] if isinstance(tree["reward"], list) else [tree["reward"]]
    for reward, entry in zip(config.rewards, entries, strict=True):
        for key in reward.may_change:
            del entry[key]
    return tree


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
            value = dict(enumerate(value))
        leaves |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves
