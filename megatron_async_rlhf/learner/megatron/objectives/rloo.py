"""Objectives of whole completions: RLOO, and RLOO with the clipped ratio. See `algorithms.rloo`."""

import torch

from megatron_async_rlhf.algorithms.reductions import Metrics
from megatron_async_rlhf.algorithms.rloo import leave_one_out_advantages, proximal_rloo_loss, rloo_loss
from megatron_async_rlhf.config.algorithms import ProximalRLOOSection
from megatron_async_rlhf.learner.megatron.objectives.mini_batch import MiniBatch
from megatron_async_rlhf.learner.megatron.objectives.policy_gradient import PolicyGradient
from megatron_async_rlhf.learner.megatron.objectives.terms import Correction, ratio_base, rewards_with_kl
from megatron_async_rlhf.learner.megatron.training.batching import MicroBatch


class RLOO(PolicyGradient):
    """The plain policy gradient of whole completions."""

    # A sum over each completion, as the policy's loss is of its whole probability.
    normalisation, length = "constant", 1

    def prepare(self, mini_batch: MiniBatch) -> None:
        """Each sample's reward against the others' of its prompt."""
        groups = rewards_with_kl(self._section.kl, mini_batch)
        advantages = torch.cat([leave_one_out_advantages(rewards_1K).squeeze(0) for rewards_1K in groups])
        for batch in mini_batch.here:
            batch.advantages_S = batch.pick(advantages)

    def surrogate(
        self,
        mini_batch: MiniBatch,
        batch: MicroBatch,
        logprobs_T: torch.Tensor,
        token_weights_T: torch.Tensor,
        correction: Correction,
    ) -> tuple[torch.Tensor, Metrics]:
        return rloo_loss(
            batch.completions.sum(logprobs_T),
            batch.advantages_S,
            batch.is_real_S,
            correction.sequence_S,
            num_sequences=mini_batch.num_sequences,
        )


class ProximalRLOO(RLOO):
    """With the clipped ratio of whole completions."""

    def __init__(self, section: ProximalRLOOSection, *, longest_completion: int) -> None:
        super().__init__(section, longest_completion=longest_completion)
        self._proximal = section

    def surrogate(
        self,
        mini_batch: MiniBatch,
        batch: MicroBatch,
        logprobs_T: torch.Tensor,
        token_weights_T: torch.Tensor,
        correction: Correction,
    ) -> tuple[torch.Tensor, Metrics]:
        keys = self._proximal
        return proximal_rloo_loss(
            batch.completions.sum(logprobs_T - ratio_base(keys, batch, logprobs_T)),
            batch.advantages_S,
            batch.is_real_S,
            correction.sequence_S,
            clip_low=keys.clip_low,
            clip_high=keys.clip_high,
            num_sequences=mini_batch.num_sequences,
        )
