import asyncio

import pytest

from megatron_async_rlhf.config.judge import JudgeRewardSection
from megatron_async_rlhf.config.rewards import BuiltinRewardSection, FunctionRewardSection, Gsm8kRewardSection
from megatron_async_rlhf.errors import RewardError
from megatron_async_rlhf.rewards.builtin import BuiltinReward
from megatron_async_rlhf.rewards.gsm8k import Gsm8kReward
from megatron_async_rlhf.rewards.judge.reward import JudgeReward
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


def test_errors_of_one_among_several_name_its_key(tmp_path):
    (tmp_path / "own.py").write_text(
        "def good(completions):\n    return [1.0] * len(completions)\n\n\ndef bad(completions):\n    return []\n"
    )
    entries = [
        FunctionRewardSection(function=f"{tmp_path}/own.py:{name}", name=name, workers=1) for name in ("good", "bad")
    ]
    reward = make_reward(entries)
    prompt = Prompt(index=0, text="p", token_ids=[1], reference={})
    completion = Completion(token_ids=[1], logprobs=[0.0], versions=[0], finished=True, text="x")
    with pytest.raises(RewardError, match="set reward.1.on_error = zero"):
        asyncio.run(reward.score(prompt, [completion]))
    reward.close()


def test_judges_have_answers_and_budgets_of_their_own(tmp_path):
    section = JudgeRewardSection(url="http://127.0.0.1:9/v1", model="m")
    one, two = (JudgeReward(section, tmp_path, key) for key in ("reward", "reward.1"))
    assert one._judge._store.path != two._judge._store.path
