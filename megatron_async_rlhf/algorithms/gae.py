"""Generalised advantage estimation over packed rows, and whitening over a whole optimizer step.

Schulman et al. 2015 (arXiv 1506.02438): `A_t = sum_l (gamma lam)^l delta_{t+l}` with
`delta_t = r_t + gamma V_{t+1} - V_t`, each completion an episode of its own.
Shape legend: T tokens of a micro-batch's row, N completion tokens among them, S sequences.
"""

import torch

from megatron_async_rlhf.algorithms.segments import Segments


@torch.no_grad()
def generalised_advantages(
    rewards_T: torch.Tensor,
    values_T: torch.Tensor,
    segments: Segments,
    *,
    gamma: float,
    lam: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns (`A + V`), 0 off completion tokens, [T] each.

    A completion ends with its last token: the state after it is worth 0, and its score belongs on that token
    (`Segments.place_last`). The paper's code lets the episode of a completion shorter than the longest allowed continue
    for one more step, after its last token, and scores it there; ours does not.

    Args:
        rewards_T: reward of each token, [T].
        values_T: value of the state before each token, [T].
        gamma, lam: 1 and 0.95 in the paper.
    """
    positions_N = segments.mask_T.nonzero().squeeze(1)
    owners_N = segments.segments_T[positions_N]
    rewards_N, values_N = rewards_T[positions_N], values_T[positions_N]
    is_last_N = segments.last_T()[positions_N]

    next_values_N = torch.where(is_last_N, 0, values_N.roll(-1))
    advantages_N = rewards_N + gamma * next_values_N - values_N
    # Each round doubles the number of steps that every token has summed up: log2(N) rounds in place of N steps.
    span = 1
    while span < len(advantages_N):
        same_sequence = owners_N[span:] == owners_N[:-span]
        later = torch.where(same_sequence, advantages_N[span:], 0)
        advantages_N[:-span] += (gamma * lam) ** span * later
        span *= 2
    advantages_T, returns_T = torch.zeros_like(values_T), torch.zeros_like(values_T)
    advantages_T[positions_N] = advantages_N
    returns_T[positions_N] = advantages_N + values_N
    return advantages_T, returns_T


def whitening_sums(values_T: torch.Tensor, mask_T: torch.Tensor) -> torch.Tensor:
    """Count, sum and sum of squares of a micro-batch, float64 [3]; add them over micro-batches and ranks."""
    values_T = values_T.detach().double().where(mask_T, 0)
    return torch.stack([mask_T.sum().double(), values_T.sum(), (values_T**2).sum()])


def whiten(
    values_T: torch.Tensor, mask_T: torch.Tensor, sums_3: torch.Tensor, *, unbiased: bool = True, epsilon: float = 1e-8
) -> torch.Tensor:
    """`(x - mean) / sqrt(var + epsilon)` on the masked tokens, 0 elsewhere; exactly 0 where all values are equal, [T].

    Args:
        sums_3: `whitening_sums` of the whole optimizer step. The paper's code uses those of one rank's rollouts.
        unbiased: divide by count - 1, as the paper's code does.
    """
    count, total, squares = sums_3
    mean = total / count.clamp(min=1)
    variance = (squares - count * mean**2) / (count - float(unbiased)).clamp(min=1)
    # A difference of two sums: of equal values only their rounding is left.
    varies = variance > 1e-12 * mean**2
    scale = torch.where(varies, (variance.clamp(min=0) + epsilon).rsqrt(), 0)
    return ((values_T.detach().double().where(mask_T, mean) - mean) * scale).to(values_T)
