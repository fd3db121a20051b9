"""The objective that a configuration asks for."""

from typing import assert_never

from megatron_async_rlhf.config.algorithms import (
    BestOfNSection,
    GRPOSection,
    OnlineDPOSection,
    PPOSection,
    ProximalRLOOSection,
    RLOOSection,
)
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.learner.megatron.objectives.grpo import GRPO
from megatron_async_rlhf.learner.megatron.objectives.objective import Objective
from megatron_async_rlhf.learner.megatron.objectives.ppo import PPO
from megatron_async_rlhf.learner.megatron.objectives.preferences import BestOfN, OnlineDPO
from megatron_async_rlhf.learner.megatron.objectives.rloo import RLOO


def choose_objective(config: RunConfig) -> Objective:
    """By `algorithm.type`."""
    section = config.algorithm
    match section:
        case OnlineDPOSection():
            return OnlineDPO(section)
        case PPOSection():
            return PPO(section)
        case RLOOSection() | ProximalRLOOSection():
            return RLOO(section)
        case GRPOSection():
            return GRPO(section, longest_completion=config.generator.max_new_tokens)
        case BestOfNSection():
            return BestOfN()
        case _:
            assert_never(section)
