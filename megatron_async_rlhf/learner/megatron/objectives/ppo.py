"""The objective of PPO, with a value model. See `algorithms.ppo` and `algorithms.gae`."""

import torch

from megatron_async_rlhf.algorithms.gae import generalised_advantages, whiten, whitening_sums
from megatron_async_rlhf.algorithms.ppo import clipped_policy_loss, clipped_value_loss
from megatron_async_rlhf.algorithms.reductions import Metrics
from megatron_async_rlhf.config.algorithms import PPOSection
from megatron_async_rlhf.learner.megatron.objectives.mini_batch import MiniBatch
from megatron_async_rlhf.learner.megatron.objectives.policy_gradient import PolicyGradient, SurrogateInputs
from megatron_async_rlhf.learner.megatron.objectives.terms import penalty_in_reward, ratio_base
from megatron_async_rlhf.learner.megatron.training.batching import MicroBatch
from megatron_async_rlhf.learner.megatron.training.steps import MicroLoss


class PPO(PolicyGradient[PPOSection]):
    """Clipped losses of policy and value model."""

    def prepare(self, mini_batch: MiniBatch) -> None:
        """Generalised advantages, whitened over the mini-batch, and the values' targets.

        Over the mini-batch and not the rollout: it is what one gradient is a mean of, so its advantages have mean 0 and
        spread 1 however many mini-batches the rollout has.
        """
        section = self._section
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

    def surrogate(self, given: SurrogateInputs) -> tuple[torch.Tensor, Metrics]:
        keys = self._section
        return clipped_policy_loss(
            given.logprobs_T,
            ratio_base(keys, given.batch, given.logprobs_T),
            given.batch.advantages_T,
            given.token_weights_T,
            given.batch.completions,
            given.correction.token_T,
            clip_low=keys.clip_low,
            clip_high=keys.clip_high,
            ratio_cap=keys.dual_clip,
            num_tokens=given.mini_batch.num_tokens,
        )

    def value_loss(self, mini_batch: MiniBatch) -> MicroLoss:
        def loss(batch: MicroBatch, values_T: torch.Tensor):
            total, metrics = clipped_value_loss(
                values_T,
                batch.values_T,
                batch.returns_T,
                batch.mask_T,
                clip=self._section.value_clip,
                num_tokens=mini_batch.num_tokens,
            )
            total = self._section.value_coefficient * total
            return total, metrics | {"loss": total.detach()}

        return loss
