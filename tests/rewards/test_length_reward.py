import asyncio

import pytest

from megatron_async_rlhf.config.rewards import Gsm8kRewardSection, LengthRewardSection
from megatron_async_rlhf.rewards.registry import make_reward
from megatron_async_rlhf.types import Completion, Prompt

PROMPT = Prompt(index=0, text="?", token_ids=[1], reference={"solution": "#### 1"})


def rewards(entries: list, *lengths: int) -> list[float]:
    def completion(length: int) -> Completion:
        zeros = [0] * length
        return Completion(token_ids=zeros, logprobs=zeros, versions=zeros, finished=True, text="#### 1")

    reward = make_reward(entries)
    reward.check(PROMPT)
    return [score.reward for score in asyncio.run(reward.score(PROMPT, [completion(length) for length in lengths]))]


def test_tokens_beyond_the_free_ones_cost_up_to_a_limit():
    section = LengthRewardSection(per_token=0.01, free_tokens=100, max_penalty=0.5)
    assert rewards([section], 0, 100, 110, 150, 10_000) == pytest.approx([0.0, 0.0, -0.1, -0.5, -0.5])


def test_distance_from_a_target_costs_on_both_sides():
    section = LengthRewardSection(per_token=0.1, target=20, free_tokens=2)
    assert rewards([section], 20, 18, 22, 15, 25, 0) == pytest.approx([0.0, 0.0, 0.0, -0.3, -0.3, -1.0])


def test_it_is_added_to_another_reward():
    entries = [Gsm8kRewardSection(), LengthRewardSection(per_token=0.01, weight=0.5)]
    assert rewards(entries, 10) == pytest.approx([1.0 - 0.05])
