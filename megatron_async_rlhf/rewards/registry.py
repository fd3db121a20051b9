"""From the configuration's `reward` to the object that scores."""

from collections.abc import Sequence
from pathlib import Path
from typing import assert_never

from megatron_async_rlhf.config.judge import JudgeRewardSection
from megatron_async_rlhf.config.rewards import (
    BuiltinRewardSection,
    FunctionRewardSection,
    Gsm8kRewardSection,
    IfevalRewardSection,
    LengthRewardSection,
    MathRewardSection,
    RewardEntry,
    RewardModelSection,
)
from megatron_async_rlhf.rewards.base import Reward
from megatron_async_rlhf.rewards.builtin import BuiltinReward
from megatron_async_rlhf.rewards.function import FunctionReward
from megatron_async_rlhf.rewards.gsm8k import Gsm8kReward
from megatron_async_rlhf.rewards.ifeval import Ifeval
from megatron_async_rlhf.rewards.judge.reward import JudgeReward
from megatron_async_rlhf.rewards.length import LengthReward
from megatron_async_rlhf.rewards.math_answer import MathAnswer
from megatron_async_rlhf.rewards.reward_model import ModelReward
from megatron_async_rlhf.rewards.verifier import Verification, WorkerVerifier
from megatron_async_rlhf.rewards.weighted_sum import Part, WeightedSum


def make_reward(entries: Sequence[RewardEntry], run_dir: Path = Path(".")) -> Reward:
    """The reward that these entries describe together. In `run_dir` it may keep what it has found out."""
    keys = ["reward"] if len(entries) == 1 else [f"reward.{place}" for place in range(len(entries))]
    rewards = [_make(entry, key, run_dir) for entry, key in zip(entries, keys, strict=True)]
    if len(rewards) == 1 and entries[0].weight == 1:
        return rewards[0]
    return WeightedSum(
        [
            Part(reward=reward, weight=entry.weight, name=entry.title if len(entries) > 1 else None)
            for reward, entry in zip(rewards, entries, strict=True)
        ]
    )


def _make(entry: RewardEntry, key: str, run_dir: Path) -> Reward:
    match entry:
        case BuiltinRewardSection():
            return BuiltinReward()
        case Gsm8kRewardSection():
            return Gsm8kReward(entry.format_reward)
        case FunctionRewardSection():
            return FunctionReward(entry, key)
        case RewardModelSection():
            return ModelReward(entry)
        case LengthRewardSection():
            return LengthReward(entry)
        case JudgeRewardSection():
            return JudgeReward(entry, run_dir, key)
        case IfevalRewardSection() | MathRewardSection():
            return WorkerVerifier(entry, verification_of(entry), key)
        case unknown:
            assert_never(unknown)


def verification_of(entry: IfevalRewardSection | MathRewardSection) -> Verification:
    """What its workers do."""
    match entry:
        case IfevalRewardSection():
            return Ifeval(mode=entry.mode, aggregate=entry.aggregate)
        case MathRewardSection():
            return MathAnswer()
