"""The contract of a reward."""

from typing import Protocol

from msgspec import Struct

from megatron_async_rlhf.types import Completion, Prompt


class Score(Struct, frozen=True, kw_only=True):
    """What a completion earned.

    Attributes:
        reward: what the algorithm maximises.
        metrics: facts by name, to be averaged over completions; the same names for every completion.
    """

    reward: float
    metrics: dict[str, float]


class Reward(Protocol):
    """Scores completions one by one; the same completion always earns the same."""

    def check(self, prompt: Prompt) -> None:
        """Refuse a prompt that cannot be scored, before the run starts.

        Raises:
            DataError: names the prompt and what its reference lacks.
        """
        ...

    def score(self, prompt: Prompt, completion: Completion) -> Score:
        """Score one completion of a prompt that passed `check`."""
        ...
