from megatron_async_rlhf.config.sections import RewardSection
from megatron_async_rlhf.rewards.builtin import BuiltinReward
from megatron_async_rlhf.rewards.gsm8k import Gsm8kReward
from megatron_async_rlhf.rewards.registry import make_reward
from megatron_async_rlhf.types import Completion, Prompt


def test_type_picks_the_reward():
    assert isinstance(make_reward(RewardSection()), BuiltinReward)
    assert isinstance(make_reward(RewardSection(type="gsm8k")), Gsm8kReward)


def test_format_reward_reaches_the_verifier():
    reward = make_reward(RewardSection(type="gsm8k", format_reward=0.3))
    prompt = Prompt(index=0, text="q", token_ids=[1], reference={"solution": "#### 1"})
    completion = Completion(token_ids=[], logprobs=[], versions=[], finished=True, text="#### 2")
    assert reward.score(prompt, completion).reward == 0.3
