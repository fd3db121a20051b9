"""What an algorithm is to the learner: advantages made before the first update, and a loss for each mini-batch.

Which passes come first (reference, proximal policy, values) and which sequences stay together is said by the config's
section, `config.algorithms`. What the passes found is on the micro-batches; see `batching.MicroBatch`.

Every loss reports its share of the total as `loss`, so that those of policy and value model add up.
"""

from typing import Any, Protocol, runtime_checkable

from megatron_async_rlhf.learner.megatron.objectives.mini_batch import MiniBatch
from megatron_async_rlhf.learner.megatron.training.steps import MicroLoss


class Objective(Protocol):
    """The objective of one algorithm, under one configuration."""

    def __init__(self, section: Any, *, longest_completion: int) -> None:
        """
        Args:
            section: the algorithm's, in the configuration.
            longest_completion: tokens.
        """

    def prepare(self, mini_batch: MiniBatch) -> None:
        """Put advantages and the like on the micro-batches. Collective; called once, before the first update."""

    def policy_loss(self, mini_batch: MiniBatch) -> MicroLoss:
        """The loss of the policy's log-probabilities."""


@runtime_checkable
class ValueObjective(Objective, Protocol):
    """The objective of an algorithm with a value model."""

    def value_loss(self, mini_batch: MiniBatch) -> MicroLoss:
        """The loss of the value model's values."""
