from megatron_async_rlhf.config.rewards import BuiltinRewardSection, Gsm8kRewardSection
from megatron_async_rlhf.rewards.builtin import BuiltinReward
from megatron_async_rlhf.rewards.gsm8k import Gsm8kReward
from megatron_async_rlhf.rewards.registry import make_reward
from megatron_async_rlhf.types import Completion, Prompt


def test_type_picks_the_reward():
    assert isinstance(make_reward([BuiltinRewardSection()]), BuiltinReward)
    assert isinstance(make_reward([Gsm8kRewardSection()]), Gsm8kReward)


def test_format_reward_reaches_the_verifier():
    reward = make_reward([Gsm8kRewardSection(format_reward=0.3)])
    prompt = Prompt(index=0, text="q", token_ids=[1], reference={"solution": "#### 1"})
    completion = Completion(token_ids=[], logprobs=[], versions=[], finished=True, text="#### 2")
    assert reward.judge(prompt, completion).reward == 0.3
