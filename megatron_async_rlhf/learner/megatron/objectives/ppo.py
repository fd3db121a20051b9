"""The objective of PPO, with a value model. See `algorithms.ppo` and `algorithms.gae`."""

import torch

from megatron_async_rlhf.algorithms.gae import generalised_advantages, whiten, whitening_sums
from megatron_async_rlhf.algorithms.ppo import clipped_policy_loss, clipped_value_loss
from megatron_async_rlhf.algorithms.reductions import Metrics
from megatron_async_rlhf.config.algorithms import PPOSection
from megatron_async_rlhf.learner.megatron.objectives.mini_batch import MiniBatch
from megatron_async_rlhf.learner.megatron.objectives.policy_gradient import PolicyGradient
from megatron_async_rlhf.learner.megatron.objectives.terms import Correction, penalty_in_reward, ratio_base
from megatron_async_rlhf.learner.megatron.training.batching import MicroBatch
from megatron_async_rlhf.learner.megatron.training.steps import MicroLoss


class PPO(PolicyGradient):
    """Clipped losses of policy and value model."""

    def __init__(self, section: PPOSection, *, longest_completion: int) -> None:
        super().__init__(section, longest_completion=longest_completion)
        self._ppo = section

    def prepare(self, mini_batch: MiniBatch) -> None:
        """Generalised advantages, whitened over the mini-batch, and the values' targets.

        Over the mini-batch and not the rollout: it is what one gradient is a mean of, so its advantages have mean 0 and
        spread 1 however many mini-batches the rollout has.
        """
        section = self._ppo
        scores = mini_batch.flat_rewards
        for batch in mini_batch.here:
            rewards_T = batch.completions.place_last(batch.pick(scores))
            if section.kl.in_reward:
                rewards_T = rewards_T + penalty_in_reward(section.kl, batch)
            batch.advantages_T, batch.returns_T = generalised_advantages(
                rewards_T, batch.values_T, batch.completions, gamma=section.gamma, lam=section.gae_lambda
            )
        if section.whiten_advantages:
            sums_3 = mini_batch.sum_over_ranks(lambda batch: whitening_sums(batch.advantages_T, batch.mask_T), 3)
            for batch in mini_batch.here:
                batch.advantages_T = whiten(batch.advantages_T, batch.mask_T, sums_3.to(batch.mask_T.device))

    def surrogate(
        self,
        mini_batch: MiniBatch,
        batch: MicroBatch,
        logprobs_T: torch.Tensor,
        token_weights_T: torch.Tensor,
        correction: Correction,
    ) -> tuple[torch.Tensor, Metrics]:
        keys = self._ppo
        return clipped_policy_loss(
            logprobs_T,
            ratio_base(keys, batch, logprobs_T),
            batch.advantages_T,
            token_weights_T,
            batch.completions,
            correction.token_T,
            clip_low=keys.clip_low,
            clip_high=keys.clip_high,
            ratio_cap=keys.dual_clip,
            num_tokens=mini_batch.num_tokens,
        )

    def value_loss(self, mini_batch: MiniBatch) -> MicroLoss:
        def loss(batch: MicroBatch, values_T: torch.Tensor):
            total, metrics = clipped_value_loss(
                values_T,
                batch.values_T,
                batch.returns_T,
                batch.mask_T,
                clip=self._ppo.value_clip,
                num_tokens=mini_batch.num_tokens,
            )
            total = self._ppo.value_coefficient * total
            return total, metrics | {"loss": total.detach()}

        return loss
