"""What a verifier in worker processes may do to a run: fail on a text, never return, or not be there at all."""

import asyncio
import os
import time

import pytest

from megatron_async_rlhf.config.reward_keys import VerifierKeys
from megatron_async_rlhf.config.rewards import IfevalRewardSection, MathRewardSection
from megatron_async_rlhf.errors import ConfigError, DataError, RewardError
from megatron_async_rlhf.rewards import preflight
from megatron_async_rlhf.rewards.base import Score
from megatron_async_rlhf.rewards.verifier import Task, WorkerVerifier, check_prompts
from megatron_async_rlhf.types import Completion, Prompt


class Section(VerifierKeys):
    type: str = "odd"


class Odd:
    """Does what the text says."""

    def check(self, task: Task) -> str | None:
        self.judge(task, task.text)
        return task.reference["wrong"]

    def judge(self, task: Task, text: str) -> tuple[float, dict[str, float]]:
        if text == "raise":
            raise ValueError("no\nidea")
        if text == "hang":
            time.sleep(1000)
        if text == "die":
            os._exit(9)
        return float(len(text)), {}


def prompt(text: str = "Say it.", wrong: str | None = None) -> Prompt:
    return Prompt(index=0, text=text, token_ids=[1], reference={"wrong": wrong}, origin="train.jsonl:5")


def scores(*texts: str, **keys: object) -> list[Score]:
    completions = [Completion(token_ids=[1], logprobs=[0.0], versions=[0], finished=True, text=text) for text in texts]
    reward = WorkerVerifier(Section(**{"workers": 2, **keys}), Odd())

    async def go() -> list[Score]:
        try:
            return await reward.score(prompt(), completions)
        finally:
            reward.close()

    return asyncio.run(go())


def test_a_text_that_breaks_the_verifier_costs_its_own_completion_alone():
    first, *broken, last = scores("ab", "raise", "hang", "die", "abc", timeout_s=3.0)
    assert (first, last) == (
        Score(reward=2.0, metrics={"reward_failed": 0.0}),
        Score(reward=3.0, metrics={"reward_failed": 0.0}),
    )
    said = ("raised ValueError: no idea", "did not return within reward.timeout_s = 3", "ended its process 2 times")
    for score, text, what in zip(broken, ("raise", "hang", "die"), said, strict=True):
        assert (score.reward, score.metrics) == (0.0, {"reward_failed": 1.0})
        assert (
            what in score.failure and f"the completion {text!r}" in score.failure and "train.jsonl:5" in score.failure
        )


def test_with_on_error_fail_it_ends_the_run():
    with pytest.raises(RewardError, match="reward odd raised ValueError.*Set reward.on_error = zero"):
        scores("ab", "raise", on_error="fail")
    assert scores("ab", on_error="fail") == [Score(reward=2.0, metrics={})]


def test_all_prompts_are_checked_and_the_first_wrong_one_is_named():
    check_prompts("reward", Section(), Odd(), [prompt()] * 250)
    with pytest.raises(DataError, match=r"^train.jsonl:5 \('x'\): no answer$"):
        check_prompts("reward", Section(), Odd(), [*[prompt()] * 150, prompt("x", wrong="no answer"), prompt("hang")])
    with pytest.raises(ConfigError, match=r"^reward.1.type = odd did not return within reward.1.timeout_s = 1$"):
        check_prompts("reward.1", Section(timeout_s=1.0), Odd(), [prompt("hang")])
    with pytest.raises(ConfigError, match=r"^reward.type = odd raised ValueError: no idea"):
        check_prompts("reward", Section(), Odd(), [prompt("raise")])


@pytest.mark.parametrize("section", [IfevalRewardSection(), MathRewardSection()], ids=lambda section: section.type)
def test_a_package_that_is_missing_is_named_with_the_way_to_get_it(section, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(preflight, "find_spec", lambda package: None)
    with pytest.raises(
        ConfigError, match=rf"type = {section.type} needs .* pip install 'megatron_async_rlhf\[rewards\]'"
    ):
        preflight.check_entry("reward", section, [])
