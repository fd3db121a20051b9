"""The objective of GRPO and its successors. See `algorithms.grpo`."""

import torch

from megatron_async_rlhf.algorithms.grpo import cispo_loss, group_advantages
from megatron_async_rlhf.algorithms.ppo import clipped_policy_loss
from megatron_async_rlhf.algorithms.reductions import Metrics
from megatron_async_rlhf.config.algorithms import GRPOSection
from megatron_async_rlhf.learner.megatron.objectives.mini_batch import MiniBatch
from megatron_async_rlhf.learner.megatron.objectives.policy_gradient import PolicyGradient, SurrogateInputs
from megatron_async_rlhf.learner.megatron.objectives.terms import ratio_base, rewards_with_kl
from megatron_async_rlhf.learner.megatron.objectives.user_loss import user_loss


class GRPO(PolicyGradient[GRPOSection]):
    """Advantages of groups, on every token alike."""

    def __init__(self, section: GRPOSection, *, longest_completion: int) -> None:
        super().__init__(section, longest_completion=longest_completion)
        self.normalisation, self.length = section.normalisation, longest_completion

    def prepare(self, mini_batch: MiniBatch) -> None:
        """Each sample's reward against its group's."""
        groups = rewards_with_kl(self._section.kl, mini_batch)
        scale = self._section.scale_advantages
        advantages = torch.cat([group_advantages(rewards_1K, scale=scale).squeeze(0) for rewards_1K in groups])
        for batch in mini_batch.here:
            batch.advantages_T = batch.completions.spread(batch.pick(advantages))

    def surrogate(self, given: SurrogateInputs) -> tuple[torch.Tensor, Metrics]:
        keys, num_tokens, batch = self._section, given.mini_batch.num_tokens, given.batch
        common = (
            given.logprobs_T,
            ratio_base(keys, batch, given.logprobs_T),
            batch.advantages_T,
            given.token_weights_T,
            batch.completions,
            given.correction.token_T,
        )
        if keys.loss_function is not None:
            return user_loss(keys.loss_function, keys.loss_kwargs)(*common, num_tokens=num_tokens)
        if keys.loss == "cispo":
            return cispo_loss(*common, ratio_high=keys.cispo_high, num_tokens=num_tokens)
        return clipped_policy_loss(
            *common,
            level=keys.ratio,
            clip_low=keys.clip_low,
            clip_high=keys.clip_high,
            ratio_cap=keys.dual_clip,
            num_tokens=num_tokens,
        )
