"""Terms that policy-gradient objectives have in common: the KL to the reference, and the off-policy correction.

Shape legend: T tokens of a micro-batch's row, S sequences in it.
"""

from dataclasses import dataclass, field

import torch

from megatron_async_rlhf.algorithms.corrections import correction_weights, sampler_divergence
from megatron_async_rlhf.algorithms.kl import kl_loss, kl_penalty
from megatron_async_rlhf.algorithms.reductions import Metrics
from megatron_async_rlhf.config.algorithm_keys import KLKeys, PolicyGradientKeys, RatioKeys
from megatron_async_rlhf.learner.megatron.objectives.mini_batch import MiniBatch
from megatron_async_rlhf.learner.megatron.training.batching import MicroBatch


def proximal_logprobs(batch: MicroBatch, logprobs_T: torch.Tensor) -> torch.Tensor:
    """Of the policy before the rollout's first update, constant, [T]; with one update that is the policy trained."""
    return logprobs_T.detach() if batch.proximal_T is None else batch.proximal_T


def ratio_base(section: RatioKeys, batch: MicroBatch, logprobs_T: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the policy that the ratio is taken against, constant, [T]."""
    return batch.sampler_T if section.ratio_base == "sampler" else proximal_logprobs(batch, logprobs_T)


@dataclass(frozen=True, kw_only=True)
class Correction:
    """Weights of tokens, or of whole sequences for losses of whole sequences; None for 1."""

    token_T: torch.Tensor | None = None
    sequence_S: torch.Tensor | None = None
    metrics: Metrics = field(default_factory=dict)


def correct(
    section: PolicyGradientKeys, mini_batch: MiniBatch, batch: MicroBatch, logprobs_T: torch.Tensor
) -> Correction:
    """What `algorithm.correction` makes of the sampler's log-probabilities. A sequence's weight is on its tokens too."""
    keys = section.correction
    if keys.type == "none":
        return Correction()
    low, high = keys.bounds
    log_ratio_T = proximal_logprobs(batch, logprobs_T) - batch.sampler_T
    if section.correction_level == "token":
        weight_T, metrics = correction_weights(
            log_ratio_T, batch.mask_T, kind=keys.kind, low=low, high=high, count=mini_batch.num_tokens
        )
        return Correction(token_T=weight_T, metrics=metrics)
    spans = batch.completions
    weight_S, metrics = correction_weights(
        spans.sum(log_ratio_T),
        batch.is_real_S,
        kind=keys.kind,
        low=low,
        high=high,
        count=mini_batch.num_sequences,
    )
    return Correction(token_T=spans.spread(weight_S), sequence_S=weight_S, metrics=metrics)


def penalty_in_reward(keys: KLKeys, batch: MicroBatch) -> torch.Tensor:
    """What the KL to the reference adds to each token's reward, [T]."""
    return kl_penalty(
        batch.proximal_T,
        batch.reference_T,
        batch.mask_T,
        coefficient=keys.coefficient,
        estimator=keys.estimator,
    )


def rewards_with_kl(keys: KLKeys, mini_batch: MiniBatch) -> list[torch.Tensor]:
    """Each group's rewards less the KL over each completion, if that is its place, float64 [1, samples]. Collective."""
    rewards = mini_batch.flat_rewards
    if keys.in_reward:
        rewards = rewards + mini_batch.sum_completions(lambda batch: penalty_in_reward(keys, batch))
    return [part.unsqueeze(0) for part in rewards.split([len(group) for group in mini_batch.rewards])]


def with_kl_loss(
    keys: KLKeys,
    mini_batch: MiniBatch,
    batch: MicroBatch,
    logprobs_T: torch.Tensor,
    token_weights_T: torch.Tensor,
    weight_T: torch.Tensor | None,
    policy: tuple[torch.Tensor, Metrics],
) -> tuple[torch.Tensor, Metrics]:
    """The policy's loss and metrics with the KL's term, if the loss is its place, and the total as `loss`.

    Args:
        token_weights_T: what a token's KL counts for, see `normalisation.token_weights`.
        weight_T: the off-policy correction: the KL is a mean over the samples as the policy's loss is.
    """
    total, metrics = policy
    if keys.in_loss:
        term, of_kl = kl_loss(
            logprobs_T,
            batch.reference_T,
            token_weights_T,
            batch.mask_T,
            weight_T,
            estimator=keys.estimator,
            gradient=keys.gradient,
            num_tokens=mini_batch.num_tokens,
        )
        total, metrics = total + keys.coefficient * term, metrics | of_kl
    return total, metrics | {"loss": total.detach()}


@torch.no_grad()
def observations(mini_batch: MiniBatch, batch: MicroBatch, logprobs_T: torch.Tensor) -> Metrics:
    """How far the policy is from reference and sampler, as far as their log-probabilities are known."""
    metrics: Metrics = {}
    if batch.reference_T is not None:
        # k1 estimate of KL(policy || reference) per completion
        apart_S = batch.completions.sum(logprobs_T - batch.reference_T)
        metrics["kl_to_reference"] = apart_S.where(batch.is_real_S, 0).sum() / mini_batch.num_sequences
    if batch.sampler_T is not None:
        metrics |= sampler_divergence(logprobs_T, batch.sampler_T, batch.mask_T, num_tokens=mini_batch.num_tokens)
    return metrics
