"""What the controller has to know to continue where another one stopped, and how it asks for that to be saved."""

from typing import Protocol

from msgspec import Struct

from megatron_async_rlhf.algorithms.reward_shaping import RewardMoments
from megatron_async_rlhf.scheduler.scoring import ScoredGroup


class ReadyGroup(Struct, frozen=True, kw_only=True):
    """A group waiting for the learner.

    Attributes:
        index: which group of the run.
        version: policy version it was admitted at.
        generate_s: from its submission to its last completion.
    """

    index: int
    version: int
    scored: ScoredGroup
    generate_s: float


class ControllerState(Struct, frozen=True, kw_only=True):
    """The loop between two rollouts.

    What was being generated is not in it but by number: it is generated anew, from the same prompts.

    Attributes:
        version: policy version the learner is at.
        admitted: groups that were ever started: the data cursor.
        ready: complete groups not trained on yet, in order of arrival.
        unfinished: indices of the groups that were under way.
        rewards: of all groups trained on, for `algorithm.reward_scale = running`.
        evaluated: the last version whose evaluation has ended; None: `version`.
    """

    version: int = 0
    admitted: int = 0
    ready: list[ReadyGroup] = []
    unfinished: list[int] = []
    rewards: RewardMoments = RewardMoments()
    evaluated: int | None = None


BEGINNING = ControllerState()


class Checkpoints(Protocol):
    """Saves a run; one save at a time: `start`, then `complete`."""

    def observe(self, metrics: dict[str, float]) -> None:
        """All metrics of a step that was just recorded."""

    def is_due(self, version: int) -> bool:
        """Whether this policy version is to be saved."""

    def is_saved(self, version: int) -> bool:
        """Whether it is there already."""

    async def start(self, state: ControllerState) -> None:
        """Returns once training may continue."""

    async def complete(self, *, deletes: bool = True) -> None:
        """Returns once the checkpoint is there, whole."""
