"""What the controller has to know to go on where another one stopped, and how it asks for that to be saved."""

from typing import Protocol

from msgspec import Struct

from megatron_async_rlhf.scheduler.scoring import ScoredBatch


class ReadyBatch(Struct, frozen=True, kw_only=True):
    """A scored batch waiting for the learner; `generate_s` is how long the generators were at it."""

    index: int
    scored: ScoredBatch
    generate_s: float


class ControllerState(Struct, frozen=True, kw_only=True):
    """The loop between two optimizer steps.

    A batch that was being generated is not in it. It is generated anew: its prompts and seeds depend on its index only.

    Attributes:
        version: policy version the learner is at.
        ready: scored batches not trained on yet, of the indices `version`, `version + 1` ...
    """

    version: int
    ready: list[ReadyBatch]

    @property
    def next_batch(self) -> int:
        """Index of the first batch that has yet to be generated: the data cursor."""
        return self.version + len(self.ready)


BEGINNING = ControllerState(version=0, ready=[])


class Checkpoints(Protocol):
    """Saves a run; one save at a time: `start`, then `complete`."""

    def observe(self, metrics: dict[str, float]) -> None:
        """All metrics of a step that was just recorded."""

    def is_due(self, version: int) -> bool:
        """Whether this policy version is to be saved."""

    async def start(self, state: ControllerState) -> None:
        """Returns once training may go on."""

    async def complete(self) -> None:
        """Returns once the checkpoint is there, whole."""
