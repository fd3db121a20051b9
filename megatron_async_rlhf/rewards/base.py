"""The contract of a reward."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from msgspec import Struct

from megatron_async_rlhf.errors import DataError
from megatron_async_rlhf.types import Completion, Prompt


class Score(Struct, frozen=True, kw_only=True):
    """What a completion earned.

    Attributes:
        reward: what the algorithm maximises.
        metrics: facts by name, to be averaged over completions; the same names for every completion.
        failure: why there is no better score than 0, if the reward failed and `on_error` is `zero`.
    """

    reward: float
    metrics: dict[str, float]
    failure: str | None = None


class Reward(Protocol):
    """Scores all completions of a prompt together."""

    def check(self, prompt: Prompt) -> None:
        """Refuse a prompt that cannot be scored, before the run starts.

        Raises:
            DataError: names the prompt and what its reference lacks.
        """
        ...

    async def score(self, prompt: Prompt, completions: Sequence[Completion]) -> list[Score]:
        """Score the completions of a prompt that passed `check`, without holding up the event loop.

        Raises:
            RewardError: there are no usable scores.
        """
        ...

    def sources(self) -> list[Path]:
        """The files with the code that scores."""
        ...

    def close(self) -> None:
        """End what was started to score; nothing is scored afterwards."""
        ...


def solution_of(prompt: Prompt, entry: str) -> str:
    """The solution that a reward needs.

    Args:
        entry: of the configuration, such as `reward.type = gsm8k`.

    Raises:
        DataError: the prompt has none.
    """
    if (solution := prompt.reference.get("solution")) is None:
        raise DataError(
            f"{prompt.name} has no solution, which {entry} needs: set data.solution_field to the column with solutions"
        )
    return solution


class Verifier(ABC):
    """A reward that judges each completion by itself, so fast that the event loop can wait for it."""

    @abstractmethod
    def check(self, prompt: Prompt) -> None: ...

    @abstractmethod
    def judge(self, prompt: Prompt, completion: Completion) -> Score:
        """Score one completion of a prompt that passed `check`; the same completion always earns the same."""

    async def score(self, prompt: Prompt, completions: Sequence[Completion]) -> list[Score]:
        return [self.judge(prompt, completion) for completion in completions]

    def sources(self) -> list[Path]:
        return [Path(inspect.getsourcefile(type(self)) or "")]

    def close(self) -> None: ...
