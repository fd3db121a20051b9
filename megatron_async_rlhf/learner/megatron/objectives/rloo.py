"""Objectives of whole completions: RLOO, and RLOO with the clipped ratio. See `algorithms.rloo`."""

import torch

from megatron_async_rlhf.algorithms.normalisation import token_weights
from megatron_async_rlhf.algorithms.rloo import leave_one_out_advantages, proximal_rloo_loss, rloo_loss
from megatron_async_rlhf.config.algorithms import ProximalRLOOSection, RLOOSection
from megatron_async_rlhf.learner.megatron.objectives.mini_batch import MiniBatch
from megatron_async_rlhf.learner.megatron.objectives.terms import (
    correct,
    ratio_base,
    rewards_with_kl,
    with_kl_loss,
)
from megatron_async_rlhf.learner.megatron.training.batching import MicroBatch
from megatron_async_rlhf.learner.megatron.training.steps import MicroLoss


class RLOO:
    """Both variants: which one is said by the section."""

    def __init__(self, section: RLOOSection | ProximalRLOOSection) -> None:
        self._section = section

    def prepare(self, mini_batch: MiniBatch) -> None:
        """Each sample's reward against the others' of its prompt."""
        groups = rewards_with_kl(self._section.kl, mini_batch)
        advantages = torch.cat([leave_one_out_advantages(rewards_1K).squeeze(0) for rewards_1K in groups])
        for batch in mini_batch.here:
            batch.advantages_S = batch.pick(advantages)

    def policy_loss(self, mini_batch: MiniBatch) -> MicroLoss:
        section, num_sequences = self._section, mini_batch.num_sequences

        def loss(batch: MicroBatch, logprobs_T: torch.Tensor):
            spans, mask_S = batch.completions, batch.is_real_S
            correction = correct(section, mini_batch, batch, logprobs_T)
            common = (batch.advantages_S, mask_S, correction.sequence_S)
            if isinstance(section, ProximalRLOOSection):
                total, metrics = proximal_rloo_loss(
                    spans.sum(logprobs_T - ratio_base(section, batch, logprobs_T)),
                    *common,
                    clip_low=section.clip_low,
                    clip_high=section.clip_high,
                    num_sequences=num_sequences,
                )
            else:
                total, metrics = rloo_loss(spans.sum(logprobs_T), *common, num_sequences=num_sequences)
            # A sum over each completion, as the policy's loss is of its whole probability.
            token_weights_T = token_weights(
                spans, "constant", num_tokens=mini_batch.num_tokens, num_sequences=num_sequences, length=1
            )
            policy = total, metrics | correction.metrics
            return with_kl_loss(section.kl, mini_batch, batch, logprobs_T, token_weights_T, correction.token_T, policy)

        return loss
