"""A judge as a reward: each completion rated by itself, or compared with others."""

import asyncio
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean

from megatron_async_rlhf.config.judge import JudgeRewardSection
from megatron_async_rlhf.errors import JudgeBudgetError, RewardError
from megatron_async_rlhf.rewards.base import Score, solution_of
from megatron_async_rlhf.rewards.failing import failed_score
from megatron_async_rlhf.rewards.judge.judge import Comparison, Judge
from megatron_async_rlhf.types import Completion, Prompt


class JudgeReward:
    """In [0, 1]: where the rating is in its range, or the share of comparisons won, an undecided one being half a win."""

    def __init__(self, section: JudgeRewardSection, directory: Path, key: str = "reward") -> None:
        """
        Args:
            directory: of the run, for answers and what was spent.
            key: of the section in the configuration.
        """
        self._section = section
        number = key.removeprefix("reward")  # of one judge among several rewards, which has a budget of its own
        self._judge = Judge(section, cache=directory / f"judge{number}.sqlite", key=key)

    def check(self, prompt: Prompt) -> None:
        if self._section.reads_solution:
            solution_of(prompt, "reward.against = solution")

    async def score(self, prompt: Prompt, completions: Sequence[Completion]) -> list[Score]:
        texts = [completion.text for completion in completions]
        if self._section.form == "pointwise":
            return list(await asyncio.gather(*(self._rated(prompt, text) for text in texts)))
        if self._section.against == "solution":
            return list(await asyncio.gather(*(self._against_solution(prompt, text) for text in texts)))
        return await self._in_group(prompt, texts)

    def sources(self) -> list[Path]:
        return [] if self._section.template is None else [self._section.template]

    def close(self) -> None:
        """Nothing: a judge holds on to nothing while it is not asked."""

    async def _rated(self, prompt: Prompt, text: str) -> Score:
        try:
            rating = await self._judge.rate(prompt.text, text, solution=prompt.reference.get("solution"))
        except RewardError as error:
            return await self._failed(prompt, error)
        low, high = self._section.range
        return self._score((rating - low) / (high - low), {"judge_score": rating})

    async def _against_solution(self, prompt: Prompt, text: str) -> Score:
        try:
            return self._won([await self._judge.compare(prompt.text, text, prompt.reference["solution"])])
        except RewardError as error:
            return await self._failed(prompt, error)

    async def _in_group(self, prompt: Prompt, texts: Sequence[str]) -> list[Score]:
        """If a comparison fails, all of the group fail: a share of other comparisons would favour some of them."""
        solution = prompt.reference.get("solution")
        pairs = list(combinations(range(len(texts)), 2))
        asked = (self._judge.compare(prompt.text, texts[i], texts[j], solution=solution) for i, j in pairs)
        results = await asyncio.gather(*asked, return_exceptions=True)
        won: list[list[Comparison]] = [[] for _ in texts]
        for (i, j), result in zip(pairs, results, strict=True):
            if isinstance(result, RewardError):
                return [await self._failed(prompt, result)] * len(texts)
            if isinstance(result, BaseException):
                raise result
            won[i].append(result)
            won[j].append(Comparison(1.0 - result.score, result.decided))
        return [self._won(comparisons) for comparisons in won]

    def _won(self, comparisons: Sequence[Comparison]) -> Score:
        """A completion alone in its group, as an evaluation samples it, neither wins nor loses."""
        comparisons = comparisons or [Comparison(0.5, False)]
        undecided = fmean(not comparison.decided for comparison in comparisons)
        return self._score(fmean(comparison.score for comparison in comparisons), {"judge_undecided": undecided})

    def _score(self, reward: float, metrics: dict[str, float]) -> Score:
        may_fail = self._section.on_error == "zero"
        return Score(reward=reward, metrics=({"reward_failed": 0.0} if may_fail else {}) | metrics)

    async def _failed(self, prompt: Prompt, error: RewardError) -> Score:
        """Raises RewardError where that must not be, and always when the budget is spent, once nothing is under way."""
        failure = f"{error}; the prompt is {prompt.name}"
        if isinstance(error, JudgeBudgetError) or self._section.on_error == "fail":
            await self._judge.settled()
            raise type(error)(failure) from None
        return failed_score(failure, self._section.metrics)
