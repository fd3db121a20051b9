"""Group relative policy optimisation and its successors, as choices of four independent parts.

Shao et al. 2024 (arXiv 2402.03300). The parts: advantages (here), the mean over tokens (`normalisation`), the ratio
(`ratios`) and the loss: `ppo.clipped_policy_loss`, or `cispo_loss` below.

| method   | advantages      | normalisation | ratio    | loss                     |
|----------|-----------------|---------------|----------|--------------------------|
| GRPO     | scaled          | sequence      | token    | clip 0.2 / 0.2           |
| Dr. GRPO | not scaled      | constant      | token    | clip 0.2 / 0.2           |
| DAPO     | scaled          | token         | token    | clip 0.2 / 0.28          |
| GSPO     | scaled          | sequence      | sequence | clip 3e-4 / 4e-4         |
| CISPO    | scaled          | token         | token    | `cispo_loss`, ratio <= 5 |

Shape legend: G prompts, K samples of each, T tokens of a micro-batch's row.
"""

import torch

from megatron_async_rlhf.algorithms.ratios import bounded_exp, policy_log_ratio
from megatron_async_rlhf.algorithms.reductions import Metrics, largest
from megatron_async_rlhf.algorithms.segments import Segments


def group_advantages(rewards_GK: torch.Tensor, *, scale: bool, epsilon: float = 1e-4) -> torch.Tensor:
    """`R - mean` of the prompt's samples, divided by `std + epsilon` if `scale`; exactly 0 where all are equal, [G, K].

    Without the division, which favours prompts with nearly equal rewards, this is Dr. GRPO's (arXiv 2503.20783).
    The standard deviation divides by K - 1.
    """
    # Advantages do not depend on a common shift; this one makes equal rewards exact zeros.
    rewards_GK = rewards_GK - rewards_GK[:, :1]
    advantages_GK = rewards_GK - rewards_GK.mean(1, keepdim=True)
    if not scale or rewards_GK.shape[1] == 1:
        return advantages_GK
    return advantages_GK / (rewards_GK.std(1, keepdim=True) + epsilon)


def cispo_loss(
    logprobs_T: torch.Tensor,
    base_T: torch.Tensor,
    advantages_T: torch.Tensor,
    token_weights_T: torch.Tensor,
    segments: Segments,
    weight_T: torch.Tensor | None = None,
    *,
    ratio_low: float = 0.0,
    ratio_high: float,
    num_tokens: int,
) -> tuple[torch.Tensor, Metrics]:
    """Sum of `-share w clip(r, ratio_low, ratio_high) A log pi` with no gradient through the ratio `r = pi / pi_base`.

    MiniMax-M1 (arXiv 2506.13585): every token keeps a gradient; only its importance is bounded. ScaleRL (arXiv
    2510.13786) uses it with the sampler as base.

    Args:
        ratio_low, ratio_high: bounds of the ratio itself, not distances from 1.
        logprobs_T, base_T, advantages_T, token_weights_T, weight_T, num_tokens: see `ppo.clipped_policy_loss`.
    """
    ratio_T = bounded_exp(policy_log_ratio(logprobs_T.detach(), base_T, segments, "token"))
    coefficient_T = segments.keep(advantages_T.detach()) * ratio_T.clamp(ratio_low, ratio_high)
    if weight_T is not None:
        coefficient_T = coefficient_T * segments.keep(weight_T.detach())
    total = -(coefficient_T * segments.keep(logprobs_T) * token_weights_T).sum()

    def mean(values_T: torch.Tensor) -> torch.Tensor:
        return segments.keep(values_T).sum() / num_tokens

    return total, {
        "policy_loss": total.detach(),
        "ratio/mean": mean(ratio_T),
        "ratio/max": largest(ratio_T, segments.mask_T),
        "ratio/clipped_low": mean((ratio_T < ratio_low).to(ratio_T)),
        "ratio/clipped_high": mean((ratio_T > ratio_high).to(ratio_T)),
    }
