"""What all policy-gradient objectives are: advantages once for a rollout, then a weighted mean of a loss made of them.

    rewards ──> advantages ──┐
    sampler ──> correction ──┼──> surrogate loss ──> + KL term, if the loss is its place
    token weights ───────────┘

An algorithm gives the two ends: how advantages are made, and the surrogate.
"""

from abc import ABC, abstractmethod
from typing import Generic, NamedTuple, TypeVar

import torch

from megatron_async_rlhf.algorithms.normalisation import Normalisation, token_weights
from megatron_async_rlhf.algorithms.reductions import Metrics
from megatron_async_rlhf.config.algorithm_keys import PolicyGradientKeys
from megatron_async_rlhf.learner.megatron.objectives.mini_batch import MiniBatch
from megatron_async_rlhf.learner.megatron.objectives.terms import Correction, correct, with_kl_loss
from megatron_async_rlhf.learner.megatron.training.batching import MicroBatch
from megatron_async_rlhf.learner.megatron.training.steps import MicroLoss

Keys = TypeVar("Keys", bound=PolicyGradientKeys)


class SurrogateInputs(NamedTuple):
    """What a surrogate is made of: a micro-batch, and what this pass and the template add to it, [T] each."""

    mini_batch: MiniBatch
    batch: MicroBatch
    logprobs_T: torch.Tensor
    token_weights_T: torch.Tensor
    correction: Correction


class PolicyGradient(ABC, Generic[Keys]):
    """Base of these objectives.

    Attributes:
        normalisation: what a token counts for in the surrogate and in the KL term.
        length: tokens of a completion that a `constant` normalisation divides by.
    """

    normalisation: Normalisation = "token"
    length: int = 1

    def __init__(self, section: Keys, *, longest_completion: int) -> None:
        self._section = section

    @abstractmethod
    def prepare(self, mini_batch: MiniBatch) -> None:
        """Put advantages on the micro-batches."""

    @abstractmethod
    def surrogate(self, given: SurrogateInputs) -> tuple[torch.Tensor, Metrics]:
        """The policy's loss without a KL term, a share of the step's, and its metrics."""

    def policy_loss(self, mini_batch: MiniBatch) -> MicroLoss:
        keys = self._section

        def loss(batch: MicroBatch, logprobs_T: torch.Tensor) -> tuple[torch.Tensor, Metrics]:
            correction = correct(keys, mini_batch, batch, logprobs_T)
            token_weights_T = token_weights(
                batch.completions,
                self.normalisation,
                num_tokens=mini_batch.num_tokens,
                num_sequences=mini_batch.num_sequences,
                length=self.length,
            )
            given = SurrogateInputs(mini_batch, batch, logprobs_T, token_weights_T, correction)
            total, metrics = self.surrogate(given)
            policy = total, metrics | correction.metrics
            return with_kl_loss(keys.kl, mini_batch, batch, logprobs_T, token_weights_T, correction.token_T, policy)

        return loss
