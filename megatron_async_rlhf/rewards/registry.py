"""From the configuration's `reward.type` to the object that scores."""

from typing import assert_never

from megatron_async_rlhf.config.sections import RewardSection
from megatron_async_rlhf.rewards.base import Reward
from megatron_async_rlhf.rewards.builtin import BuiltinReward
from megatron_async_rlhf.rewards.gsm8k import Gsm8kReward


def make_reward(config: RewardSection) -> Reward:
    """The reward that `reward.type` names."""
    match config.type:
        case "builtin":
            return BuiltinReward()
        case "gsm8k":
            return Gsm8kReward(config.format_reward)
        case unknown:
            assert_never(unknown)
