"""Objectives that have no advantages: they learn from which sample was better."""

import torch

from megatron_async_rlhf.algorithms.best_of_n import best_of_n_loss
from megatron_async_rlhf.algorithms.online_dpo import online_dpo_loss
from megatron_async_rlhf.config.algorithms import BestOfNSection, OnlineDPOSection
from megatron_async_rlhf.learner.megatron.objectives.mini_batch import MiniBatch
from megatron_async_rlhf.learner.megatron.training.batching import MicroBatch
from megatron_async_rlhf.learner.megatron.training.steps import MicroLoss


class OnlineDPO:
    """A loss of preference pairs, whose chosen and rejected completions take turns in the batch."""

    def __init__(self, section: OnlineDPOSection, *, longest_completion: int) -> None:
        self._section = section

    def prepare(self, mini_batch: MiniBatch) -> None:
        """Nothing."""

    def policy_loss(self, mini_batch: MiniBatch) -> MicroLoss:
        def loss(batch: MicroBatch, logprobs_T: torch.Tensor):
            policy_S = batch.completions.sum(logprobs_T)
            reference_S = batch.completions.sum(batch.reference_T)
            return online_dpo_loss(
                policy_S[0::2],
                policy_S[1::2],
                reference_S[0::2],
                reference_S[1::2],
                batch.is_real_S[0::2].to(policy_S),
                beta=self._section.beta,
                loss=self._section.loss,
                num_pairs=mini_batch.num_sequences // 2,
            )

        return loss


class BestOfN:
    """The likelihood of the best samples."""

    def __init__(self, section: BestOfNSection, *, longest_completion: int) -> None:
        """Nothing of it matters."""

    def prepare(self, mini_batch: MiniBatch) -> None:
        """Nothing."""

    def policy_loss(self, mini_batch: MiniBatch) -> MicroLoss:
        def loss(batch: MicroBatch, logprobs_T: torch.Tensor):
            policy_S = batch.completions.sum(logprobs_T)
            return best_of_n_loss(policy_S, batch.is_real_S, num_sequences=mini_batch.num_sequences)

        return loss
