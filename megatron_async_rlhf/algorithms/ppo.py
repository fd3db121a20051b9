"""Proximal policy optimisation: clipped losses of the policy and of the value function.

Schulman et al. 2017 (arXiv 1707.06347). Noukhovitch et al. (arXiv 2410.18252) train `policy + 0.1 value` with clip
0.2 on both, advantages of `gae` and the KL to the reference in the reward (`kl.kl_penalty`, 0.05).
Shape legend: T tokens of a micro-batch's row.
"""

import torch

from megatron_async_rlhf.algorithms.ratios import RatioLevel, bounded_exp, policy_log_ratio
from megatron_async_rlhf.algorithms.reductions import Metrics, largest
from megatron_async_rlhf.algorithms.segments import Segments


def clipped_surrogate(
    ratio: torch.Tensor,
    advantages: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
    ratio_cap: float | None = None,
) -> torch.Tensor:
    """`max(-A min(r, ratio_cap), -A clip(r, 1 - clip_low, 1 + clip_high))` of any shape.

    Args:
        ratio_cap: bounds the loss of a bad token whose probability grew (dual clip, Ye et al. 2020, arXiv 1912.09729;
            two-sided clipping of INTELLECT-2, arXiv 2505.07291); above `1 + clip_high` to have a meaning of its own.
    """
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    if ratio_cap is not None:
        ratio = ratio.clamp(max=ratio_cap)
    return torch.maximum(-advantages * ratio, -advantages * clipped)


def clip_metrics(
    ratio: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, *, clip_low: float, clip_high: float, count: int
) -> Metrics:
    """Mean and largest ratio, and shares of the `count` items of the step whose gradient the clip takes away on either side."""
    low = (ratio < 1 - clip_low) & (advantages < 0)
    high = (ratio > 1 + clip_high) & (advantages > 0)
    values = {"ratio/mean": ratio, "ratio/clipped_low": low.to(ratio), "ratio/clipped_high": high.to(ratio)}
    shares: Metrics = {name: value.detach().where(mask, 0).sum() / count for name, value in values.items()}
    return shares | {"ratio/max": largest(ratio, mask)}


def clipped_policy_loss(
    logprobs_T: torch.Tensor,
    base_T: torch.Tensor,
    advantages_T: torch.Tensor,
    token_weights_T: torch.Tensor,
    segments: Segments,
    weight_T: torch.Tensor | None = None,
    *,
    level: RatioLevel = "token",
    clip_low: float,
    clip_high: float,
    ratio_cap: float | None = None,
    num_tokens: int,
) -> tuple[torch.Tensor, Metrics]:
    """Sum of `share w max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))` with `r = pi / pi_base`; PPO and GRPO.

    Args:
        logprobs_T: of the policy being trained, [T].
        base_T: of the policy that the clip keeps it near, constant. The proximal policy is the paper's (its code
            recomputes it just before the update, so that the ratio starts at 1) and decoupled PPO's; the sampler makes
            it PPO around the behaviour policy.
        advantages_T: constant, [T].
        token_weights_T: see `normalisation.token_weights`, [T].
        weight_T: off-policy correction of each token, constant, see `corrections`; None for 1, [T].
        clip_low, clip_high: 0.2 and 0.2 in the paper; DAPO raises the upper one (0.28) so that rare tokens can grow.
        num_tokens: completion tokens of the whole optimizer step, for the metrics.
    """
    advantages_T = segments.keep(advantages_T.detach())
    ratio_T = bounded_exp(policy_log_ratio(logprobs_T, base_T, segments, level))
    losses_T = clipped_surrogate(ratio_T, advantages_T, clip_low=clip_low, clip_high=clip_high, ratio_cap=ratio_cap)
    if weight_T is not None:
        losses_T = losses_T * segments.keep(weight_T.detach())
    total = (losses_T * token_weights_T).sum()
    metrics = clip_metrics(
        ratio_T, advantages_T, segments.mask_T, clip_low=clip_low, clip_high=clip_high, count=num_tokens
    )
    return total, {"policy_loss": total.detach(), **metrics}


def clipped_value_loss(
    values_T: torch.Tensor,
    old_values_T: torch.Tensor,
    returns_T: torch.Tensor,
    mask_T: torch.Tensor,
    *,
    clip: float | None,
    num_tokens: int,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """`0.5 mean max((V - R)^2, (clip(V, V_old +- clip) - R)^2)` over `num_tokens` of the whole optimizer step.

    Args:
        values_T: of the value function being trained, [T].
        old_values_T, returns_T: its values before the update, and the targets made from them by `gae`; constant, [T].
        mask_T: True on tokens that count, bool, [T].
        clip: 0.2 in the paper; None for no clip.
    """
    returns_T, old_values_T = (values.detach().where(mask_T, 0) for values in (returns_T, old_values_T))
    values_T = values_T.where(mask_T, 0)
    errors_T = (values_T - returns_T) ** 2
    worst_T = errors_T
    if clip is not None:
        near_T = values_T.clamp(old_values_T - clip, old_values_T + clip)
        worst_T = torch.maximum(errors_T, (near_T - returns_T) ** 2)
    total = 0.5 * worst_T.sum() / num_tokens
    metrics = {
        "value_loss": total.detach(),
        "value/error": errors_T.detach().sum() / num_tokens,
        "value/clipped": (worst_T > errors_T).sum() / num_tokens,
        "value/mean": values_T.detach().sum() / num_tokens,
    }
    return total, metrics
