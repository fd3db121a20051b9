"""From the configuration's `reward` to the object that scores."""

from collections.abc import Sequence
from typing import assert_never

from megatron_async_rlhf.config.rewards import (
    BuiltinRewardSection,
    FunctionRewardSection,
    Gsm8kRewardSection,
    RewardEntry,
    RewardModelSection,
)
from megatron_async_rlhf.rewards.base import Reward
from megatron_async_rlhf.rewards.builtin import BuiltinReward
from megatron_async_rlhf.rewards.function import FunctionReward
from megatron_async_rlhf.rewards.gsm8k import Gsm8kReward
from megatron_async_rlhf.rewards.reward_model import ModelReward
from megatron_async_rlhf.rewards.weighted_sum import Part, WeightedSum


def make_reward(entries: Sequence[RewardEntry]) -> Reward:
    """The reward that these entries describe together."""
    rewards = [_make(entry) for entry in entries]
    if len(rewards) == 1 and entries[0].weight == 1:
        return rewards[0]
    return WeightedSum(
        [
            Part(reward=reward, weight=entry.weight, name=entry.title if len(entries) > 1 else None)
            for reward, entry in zip(rewards, entries, strict=True)
        ]
    )


def _make(entry: RewardEntry) -> Reward:
    match entry:
        case BuiltinRewardSection():
            return BuiltinReward()
        case Gsm8kRewardSection():
            return Gsm8kReward(entry.format_reward)
        case FunctionRewardSection():
            return FunctionReward(entry)
        case RewardModelSection():
            return ModelReward(entry)
        case unknown:
            assert_never(unknown)
