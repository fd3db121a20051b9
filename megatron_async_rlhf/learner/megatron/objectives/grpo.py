"""The objective of GRPO and its successors. See `algorithms.grpo`."""

import torch

from megatron_async_rlhf.algorithms.grpo import cispo_loss, group_advantages
from megatron_async_rlhf.algorithms.normalisation import token_weights
from megatron_async_rlhf.algorithms.ppo import clipped_policy_loss
from megatron_async_rlhf.config.algorithms import GRPOSection
from megatron_async_rlhf.learner.megatron.objectives.mini_batch import MiniBatch
from megatron_async_rlhf.learner.megatron.objectives.terms import (
    correct,
    ratio_base,
    rewards_with_kl,
    with_kl_loss,
)
from megatron_async_rlhf.learner.megatron.training.batching import MicroBatch
from megatron_async_rlhf.learner.megatron.training.steps import MicroLoss


class GRPO:
    """Advantages of groups, on every token alike."""

    def __init__(self, section: GRPOSection, *, longest_completion: int) -> None:
        self._section = section
        self._longest = longest_completion

    def prepare(self, mini_batch: MiniBatch) -> None:
        """Each sample's reward against its group's."""
        groups = rewards_with_kl(self._section.kl, mini_batch)
        scale = self._section.scale_advantages
        advantages = torch.cat([group_advantages(rewards_1K, scale=scale).squeeze(0) for rewards_1K in groups])
        for batch in mini_batch.here:
            batch.advantages_T = batch.completions.spread(batch.pick(advantages))

    def policy_loss(self, mini_batch: MiniBatch) -> MicroLoss:
        section, num_tokens = self._section, mini_batch.num_tokens

        def loss(batch: MicroBatch, logprobs_T: torch.Tensor):
            spans = batch.completions
            correction = correct(section, mini_batch, batch, logprobs_T)
            token_weights_T = token_weights(
                spans,
                section.normalisation,
                num_tokens=num_tokens,
                num_sequences=mini_batch.num_sequences,
                length=self._longest,
            )
            base_T = ratio_base(section, batch, logprobs_T)
            common = (logprobs_T, base_T, batch.advantages_T, token_weights_T, spans, correction.token_T)
            if section.loss == "cispo":
                total, metrics = cispo_loss(*common, ratio_high=section.cispo_high, num_tokens=num_tokens)
            else:
                total, metrics = clipped_policy_loss(
                    *common,
                    level=section.ratio,
                    clip_low=section.clip_low,
                    clip_high=section.clip_high,
                    ratio_cap=section.dual_clip,
                    num_tokens=num_tokens,
                )
            policy = total, metrics | correction.metrics
            return with_kl_loss(section.kl, mini_batch, batch, logprobs_T, token_weights_T, correction.token_T, policy)

        return loss
