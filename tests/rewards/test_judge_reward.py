"""What a judge's verdicts are worth to completions."""

import asyncio
from pathlib import Path

import pytest
import yaml
from judge_server import longer_is_better, question, serving

from megatron_async_rlhf.config.judge import JudgeRewardSection
from megatron_async_rlhf.config.load import load_config
from megatron_async_rlhf.errors import ConfigError, DataError, JudgeBudgetError, JudgeError
from megatron_async_rlhf.rewards.base import Score
from megatron_async_rlhf.rewards.preflight import check_entry
from megatron_async_rlhf.rewards.registry import make_reward
from megatron_async_rlhf.types import Completion, Prompt

PROMPT = Prompt(index=0, text="Say it.", token_ids=[1], reference={"solution": "long"}, origin="train.jsonl:5")
LIMITS = {"model": "m", "timeout_s": 5.0, "give_up_s": 5.0}


def scores(say, run_dir: Path, *texts: str, prompt: Prompt = PROMPT, **keys: object) -> tuple[list[Score], int]:
    """And the number of requests."""

    async def go() -> tuple[list[Score], int]:
        async with serving(say) as server:
            section = JudgeRewardSection(url=server.url, **{**LIMITS, **keys})
            reward = make_reward([section], run_dir)
            reward.check(prompt)
            check_entry("reward", section, [prompt])
            completions = [Completion(token_ids=[1], logprobs=[0], versions=[0], finished=True, text=t) for t in texts]
            try:
                return await reward.score(prompt, completions), len(server.requests)
            finally:
                reward.close()

    return asyncio.run(go())


def test_each_completion_against_the_others_of_its_group(tmp_path: Path):
    found, requests = scores(longer_is_better, tmp_path / "run", "a", "ccc", "bb", "ccc")
    assert [score.reward for score in found] == pytest.approx([0.0, 2.5 / 3, 1 / 3, 2.5 / 3])
    assert [score.metrics["judge_undecided"] for score in found] == pytest.approx([0.0, 1 / 3, 0.0, 1 / 3])
    assert requests == 6  # three different pairs of texts, in both orders
    assert (tmp_path / "run/judge.sqlite").is_file()
    alone, requests = scores(longer_is_better, tmp_path, "a")  # as an evaluation samples it
    assert (alone[0].reward, requests) == (0.5, 0)


def test_each_completion_against_the_solution(tmp_path: Path):
    found, requests = scores(longer_is_better, tmp_path, "a", "longer", "four", against="solution")
    assert [score.reward for score in found] == [0.0, 1.0, 0.5] and requests == 6
    with pytest.raises(DataError, match="train.jsonl:5.* no solution, which reward.against = solution needs"):
        without = Prompt(index=0, text="", token_ids=[1], reference={}, origin="train.jsonl:5")
        scores(longer_is_better, tmp_path, "a", prompt=without, against="solution")


def test_a_rating_is_where_it_lies_in_its_range(tmp_path: Path):
    def rate(request: dict, number: int) -> str:
        assert "long" in question(request)  # the solution
        return "[[5]]" if "good" in question(request).partition("assistant]")[2] else "[[1]]"

    found, requests = scores(rate, tmp_path, "good", "bad", "good", form="pointwise", range=[1, 9], on_error="zero")
    assert [score.reward for score in found] == [0.5, 0.0, 0.5] and requests == 2
    assert found[0].metrics == {"judge_score": 5.0, "reward_failed": 0.0}


def test_what_fails_ends_the_run_or_earns_nothing(tmp_path: Path):
    def vague(request: dict, number: int) -> str:
        return "Well." if "odd" in question(request) else "[[7]]"

    line = (
        r"judge m at .*: no verdict can be read from its answer 'Well.' .*; the prompt is train.jsonl:5 \('Say it.'\)$"
    )
    with pytest.raises(JudgeError, match=line):
        scores(vague, tmp_path, "odd", "fine", form="pointwise")
    (odd, fine), _ = scores(vague, tmp_path, "odd", "fine", form="pointwise", on_error="zero")
    assert (odd.reward, odd.metrics) == (
        0.0,
        {"judge_score": 0.0, "reward_failed": 1.0},
    ) and "no verdict" in odd.failure
    assert fine.reward == pytest.approx(6 / 9)
    group, _ = scores(vague, tmp_path, "odd", "x", "y", on_error="zero", cache=tmp_path / "other.sqlite")
    assert [score.reward for score in group] == [0.0] * 3 and all(score.failure for score in group)


def test_a_spent_budget_ends_the_run_whatever_on_error_says(tmp_path: Path):
    with pytest.raises(JudgeBudgetError, match="reward.budget.max_calls = 3. Raise it and continue .--resume of a run"):
        scores(longer_is_better, tmp_path, "a", "bb", "ccc", on_error="zero", budget={"max_calls": 3})
    found, requests = scores(longer_is_better, tmp_path, "a", "bb", "ccc")
    assert [score.reward for score in found] == [0.0, 0.5, 1.0] and requests == 3  # those that were not paid for


@pytest.mark.parametrize("keys", [{}, {"against": "solution"}, {"form": "pointwise"}])
def test_what_is_paid_for_is_kept_although_the_run_ends_meanwhile(tmp_path: Path, keys: dict):
    async def slow(request: dict, number: int) -> str:
        await asyncio.sleep(0.3)
        return "[[A]] [[5]]"

    with pytest.raises(JudgeBudgetError):
        scores(slow, tmp_path, "a", "bb", "ccc", budget={"max_calls": 2}, **keys)
    needed = 3 if "form" in keys else 6
    assert scores(slow, tmp_path, "a", "bb", "ccc", **keys)[1] == needed - 2


def test_before_the_run_template_and_key_are_looked_at(tmp_path: Path):
    for keys, says in (({"template": tmp_path / "none"}, "reward.template"), ({"api_key_env": "NOT_SET"}, "NOT_SET")):
        with pytest.raises(ConfigError, match=says):
            check_entry("reward", JudgeRewardSection(url="http://x/v1", **LIMITS, **keys), [])


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"url": "localhost:8000"}, "must be the address of an API"),
        ({"range": [3, 3]}, "is empty"),
        ({"pattern": "("}, "is no regular expression"),
        ({"pattern": "[0-9]"}, "must have one group"),
        ({"pattern": "([0-9])", "json_key": "score"}, "remove one"),
        ({"timeout_s": 10.0}, "is below timeout_s = 10"),
    ],
)
def test_keys_that_will_not_do(keys: dict, says: str):
    with pytest.raises(ValueError, match=says):
        JudgeRewardSection(**{"url": "http://x/v1", **LIMITS, **keys})


def test_the_address_may_be_that_of_the_api_or_of_its_chat():
    for url in ("http://x/v1", "http://x/v1/", "http://x/v1/chat/completions"):
        assert JudgeRewardSection(url=url, **LIMITS).url == "http://x/v1"


@pytest.mark.parametrize(
    "keys", [{"api_key": "s3cret"}, {"api_key_env": "s3cret"}, {"url": "https://me:s3cret@x/v1"}, {"url": "//s3cret@x"}]
)
def test_a_secret_in_the_configuration_is_refused_and_not_shown(keys: dict, tmp_path: Path):
    tree = {
        "model": {"layers": 2, "hidden_size": 64, "ffn_size": 96, "heads": 2, "context_length": 96},
        "data": {"train": "prompts.jsonl"},
        "reward": {"type": "judge", "url": "http://x/v1", "model": "m", **keys},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=r"^reward.*api_key_env") as refused:
        load_config(path)
    assert "s3cret" not in str(refused.value)
