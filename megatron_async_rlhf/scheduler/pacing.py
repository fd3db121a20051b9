"""Staleness kept by admission: who may start what, decided on four integers.

Batch `i` is trained by the optimizer step that turns policy version `i` into `i + 1`. Generators sample it with the
version they hold when it is submitted or a later one (weights only move forward), so admitting batch `i` only when

    i - pushed <= bound

bounds the staleness of every token at consumption, `i - version(token) <= bound`, whatever the speeds are. With
bound 0 generation and learning alternate (sync); with bound 1 every batch after the first is exactly one step
off-policy, the schedule of the paper (arXiv 2410.18252, figure 2).
"""

from collections.abc import Iterable

from megatron_async_rlhf.errors import StaleSampleError


class Pacer:
    """State of the schedule. Weights change hands only while no batch is being generated."""

    def __init__(self, bound: int, version: int = 0) -> None:
        self.bound = bound
        self.trained = version  # policy version the learner is at
        self.pushed = version  # policy version the generators hold
        self.generating = False
        self.pushing = False
        self.learner_busy = False

    def may_submit(self, batch: int) -> bool:
        """A batch may start if the bound holds and no push is about to take the generators."""
        push_is_next = self.trained > self.pushed and not self.learner_busy
        return batch - self.pushed <= self.bound and not self.pushing and not push_is_next

    def may_push(self) -> bool:
        """Newer weights exist and the generators are between batches."""
        return self.trained > self.pushed and not self.generating and not self.pushing

    def staleness(self, versions: Iterable[int]) -> list[int]:
        """Staleness of tokens if they are trained on now, in optimizer steps.

        Raises:
            StaleSampleError: a token breaks the bound, or is from the future.
        """
        ages = [self.trained - version for version in versions]
        if ages and not 0 <= min(ages) <= max(ages) <= self.bound:
            raise StaleSampleError(
                f"training version {self.trained} on tokens of versions {self.trained - max(ages)} to "
                f"{self.trained - min(ages)} breaks max_staleness = {self.bound}; this is a bug in pacing"
            )
        return ages
