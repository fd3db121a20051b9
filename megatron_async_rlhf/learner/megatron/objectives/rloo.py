"""Objectives of whole completions: RLOO, and RLOO with the clipped ratio. See `algorithms.rloo`."""

import torch

from megatron_async_rlhf.algorithms.reductions import Metrics
from megatron_async_rlhf.algorithms.rloo import leave_one_out_advantages, proximal_rloo_loss, rloo_loss
from megatron_async_rlhf.config.algorithms import ProximalRLOOSection, RLOOSection
from megatron_async_rlhf.learner.megatron.objectives.mini_batch import MiniBatch
from megatron_async_rlhf.learner.megatron.objectives.policy_gradient import Keys, PolicyGradient, SurrogateInputs
from megatron_async_rlhf.learner.megatron.objectives.terms import ratio_base, rewards_with_kl


class LeaveOneOut(PolicyGradient[Keys]):
    """What both have in common: advantages of whole completions."""

    # A sum over each completion, as the policy's loss is of its whole probability.
    normalisation, length = "constant", 1

    def prepare(self, mini_batch: MiniBatch) -> None:
        """Each sample's reward against the others' of its prompt."""
        groups = rewards_with_kl(self._section.kl, mini_batch)
        advantages = torch.cat([leave_one_out_advantages(rewards_1K).squeeze(0) for rewards_1K in groups])
        for batch in mini_batch.here:
            batch.advantages_S = batch.pick(advantages)


class RLOO(LeaveOneOut[RLOOSection]):
    """The plain policy gradient of whole completions."""

    def surrogate(self, given: SurrogateInputs) -> tuple[torch.Tensor, Metrics]:
        batch = given.batch
        return rloo_loss(
            batch.completions.sum(given.logprobs_T),
            batch.advantages_S,
            batch.is_real_S,
            given.correction.sequence_S,
            num_sequences=given.mini_batch.num_sequences,
        )


class ProximalRLOO(LeaveOneOut[ProximalRLOOSection]):
    """With the clipped ratio of whole completions."""

    def surrogate(self, given: SurrogateInputs) -> tuple[torch.Tensor, Metrics]:
        keys, batch = self._section, given.batch
        return proximal_rloo_loss(
            batch.completions.sum(given.logprobs_T - ratio_base(keys, batch, given.logprobs_T)),
            batch.advantages_S,
            batch.is_real_S,
            given.correction.sequence_S,
            clip_low=keys.clip_low,
            clip_high=keys.clip_high,
            num_sequences=given.mini_batch.num_sequences,
        )
