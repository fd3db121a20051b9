"""What is found out about a reward before a run starts that takes more than its configuration and a prompt at a time."""

import sys
from collections.abc import Sequence
from importlib.util import find_spec

from megatron_async_rlhf.config.judge import JudgeRewardSection
from megatron_async_rlhf.config.reward_keys import RewardKeys
from megatron_async_rlhf.config.rewards import (
    FunctionRewardSection,
    IfevalRewardSection,
    MathRewardSection,
    RewardEntry,
)
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.rewards.function import check_function
from megatron_async_rlhf.rewards.judge.judge import check_api_key, check_template
from megatron_async_rlhf.rewards.registry import verification_of
from megatron_async_rlhf.rewards.verifier import check_prompts
from megatron_async_rlhf.types import Prompt


def check_entry(key: str, entry: RewardEntry, prompts: Sequence[Prompt]) -> None:
    """
    Args:
        key: of `entry` in the configuration.
        prompts: all that it is to score.

    Raises:
        ConfigError, DataError: one line.
    """
    check_packages(key, entry)
    match entry:
        case FunctionRewardSection():
            check_function(key, entry, [prompt.reference for prompt in prompts])
        case IfevalRewardSection() | MathRewardSection():
            check_prompts(key, entry, verification_of(entry), prompts)
        case JudgeRewardSection():
            check_template(entry, key)
            check_api_key(entry, key)


def check_packages(key: str, entry: RewardKeys) -> None:
    """
    Raises:
        ConfigError: something that the reward imports is not installed.
    """
    if missing := [package for package in entry.packages if find_spec(package) is None]:
        raise ConfigError(
            f"{key}.type = {entry.type} needs {', '.join(missing)}, not installed in {sys.prefix}: pip install "
            "'megatron_async_rlhf[rewards]'"
        )
