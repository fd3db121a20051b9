"""Several rewards as one."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from megatron_async_rlhf.rewards.base import Reward, Score
from megatron_async_rlhf.types import Completion, Prompt


class Part(Struct, frozen=True, kw_only=True):
    """One of them. `name` begins the names of its metrics; None keeps them as they are."""

    reward: Reward
    weight: float
    name: str | None = None


class WeightedSum:
    """The sum of the parts' scores, each times its weight; each named part is also a metric, `reward/<name>`."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts

    def check(self, prompt: Prompt) -> None:
        for part in self.parts:
            part.reward.check(prompt)

    async def score(self, prompt: Prompt, completions: Sequence[Completion]) -> list[Score]:
        by_part = await asyncio.gather(*(part.reward.score(prompt, completions) for part in self.parts))
        return [self._sum(scores) for scores in zip(*by_part, strict=True)]

    def sources(self) -> list[Path]:
        return [path for part in self.parts for path in part.reward.sources()]

    def close(self) -> None:
        for part in self.parts:
            part.reward.close()

    def _sum(self, scores: Sequence[Score]) -> Score:
        metrics: dict[str, float] = {}
        for part, score in zip(self.parts, scores, strict=True):
            if part.name is None:
                metrics |= score.metrics
            else:
                metrics[f"reward/{part.name}"] = score.reward
                metrics |= {f"{part.name}/{name}": value for name, value in score.metrics.items()}
        total = sum(part.weight * score.reward for part, score in zip(self.parts, scores, strict=True))
        failures = [score.failure for score in scores if score.failure is not None]
        return Score(reward=total, metrics=metrics, failure=failures[0] if failures else None)
