"""REINFORCE leave-one-out: each sample's baseline is the mean reward of the other samples of its prompt.

Ahmadian et al. 2024 (arXiv 2402.14740). Noukhovitch et al. (arXiv 2410.18252) take K = 2, put the KL to the reference
into the reward (0.05 times its sum over the completion, `kl.kl_penalty`), and clip the ratio of whole completions:
Proximal RLOO. Shape legend: G prompts, K samples of each, S sequences of one micro-batch.
"""

import torch

from megatron_async_rlhf.algorithms.ppo import clip_metrics, clipped_surrogate
from megatron_async_rlhf.algorithms.ratios import bounded_exp
from megatron_async_rlhf.algorithms.reductions import Metrics


def leave_one_out_advantages(rewards_GK: torch.Tensor) -> torch.Tensor:
    """`A_i = R_i - mean_{j != i} R_j`, exactly 0 where all rewards of a prompt are equal, [G, K].

    Raises:
        ValueError: for K = 1, where nothing is left out.
    """
    samples = rewards_GK.shape[1]
    if samples < 2:
        raise ValueError(f"leave-one-out needs at least 2 samples per prompt, got {samples}")
    # Advantages do not depend on a common shift; this one makes equal rewards exact zeros.
    rewards_GK = rewards_GK - rewards_GK[:, :1]
    return rewards_GK - (rewards_GK.sum(1, keepdim=True) - rewards_GK) / (samples - 1)


def rloo_loss(
    policy_S: torch.Tensor,
    advantages_S: torch.Tensor,
    mask_S: torch.Tensor,
    weight_S: torch.Tensor | None = None,
    *,
    num_sequences: int,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Sum of `-w A log pi(y)` over `num_sequences`: the plain policy gradient, without ratio or clip.

    Args:
        policy_S: log-probability of the whole completion, [S].
        advantages_S: constant, [S].
        mask_S: True for a real sequence, bool, [S].
        weight_S: off-policy correction of each sequence, constant, see `corrections`; None for 1, [S].
        num_sequences: real sequences of the whole optimizer step: the denominator.
    """
    losses_S = -advantages_S.detach().where(mask_S, 0) * policy_S.where(mask_S, 0)
    return _mean(losses_S, mask_S, weight_S, num_sequences)


def proximal_rloo_loss(
    log_ratio_S: torch.Tensor,
    advantages_S: torch.Tensor,
    mask_S: torch.Tensor,
    weight_S: torch.Tensor | None = None,
    *,
    clip_low: float,
    clip_high: float,
    num_sequences: int,
) -> tuple[torch.Tensor, Metrics]:
    """Sum of `w max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))` over `num_sequences`, `r = exp(log_ratio)`.

    Args:
        log_ratio_S: `log pi(y) / pi_base(y)`, the sum of the tokens' differences (which keeps the digits that a
            difference of two sums would lose), [S]. The base is the proximal policy in the paper's code; with the
            sampler's log-probabilities in its place the ratio corrects for staleness too.
        clip_low, clip_high: 0.2 and 0.2 in the paper.
        advantages_S, mask_S, weight_S, num_sequences: see `rloo_loss`.
    """
    advantages_S = advantages_S.detach().where(mask_S, 0)
    ratio_S = bounded_exp(log_ratio_S.where(mask_S, 0))
    losses_S = clipped_surrogate(ratio_S, advantages_S, clip_low=clip_low, clip_high=clip_high)
    total, metrics = _mean(losses_S, mask_S, weight_S, num_sequences)
    return total, metrics | clip_metrics(
        ratio_S, advantages_S, mask_S, clip_low=clip_low, clip_high=clip_high, count=num_sequences
    )


def _mean(
    losses_S: torch.Tensor, mask_S: torch.Tensor, weight_S: torch.Tensor | None, num_sequences: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    if weight_S is not None:
        losses_S = losses_S * weight_S.detach().where(mask_S, 0)
    total = losses_S.sum() / num_sequences
    return total, {"policy_loss": total.detach()}
