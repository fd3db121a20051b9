"""Off-policy corrections: weights for samples that another policy than the one before the update has drawn.

The sampler's log-probabilities come with the tokens; the proximal policy's are recomputed before the update. They
differ by staleness and by how generator and learner compute. A policy loss with the ratio `pi / pi_proximal` times the
weight made of `rho = pi_proximal / pi_sampler` corrects for both and still clips around the proximal policy:

| name                                             | kind     | rho of   | low, high |
|--------------------------------------------------|----------|----------|-----------|
| decoupled PPO (AReaL, arXiv 2505.24298)          | truncate | token    | 0, inf    |
| truncated importance sampling (OLMo 3: C = 2)    | truncate | token    | 0, C      |
| the same of whole sequences                      | truncate | sequence | 0, C      |
| IcePop (Ring-1T, arXiv 2510.18855)               | mask     | token    | 0.5, 5    |
| masked sequences                                 | mask     | sequence | 0, C      |

With the sampler as the base of the ratio, as the paper has it, there is nothing left to correct.
Shape legend: N tokens of a row (rho of tokens) or sequences of a micro-batch (rho of sequences); T tokens.
"""

import math
from collections.abc import Mapping
from typing import Literal, assert_never

import torch

from megatron_async_rlhf.algorithms.kl import kl_estimate
from megatron_async_rlhf.algorithms.ratios import bounded_exp

Correction = Literal["truncate", "mask"]


@torch.no_grad()
def correction_weights(
    log_ratio_N: torch.Tensor,
    mask_N: torch.Tensor,
    *,
    kind: Correction,
    low: float = 0.0,
    high: float = math.inf,
    count: int,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Constant weights, 0 off the mask, [N], and metrics that add up over micro-batches and ranks.

    `truncate`: `clip(rho, low, high)`; `mask`: rho within [low, high], 0 outside.

    Args:
        log_ratio_N: `log pi_proximal / pi_sampler` of each token, or summed over each sequence's completion tokens
            (`Segments.sum`; `Segments.spread` brings such weights to a token-level loss).
        mask_N: True for what is trained, bool, [N].
        count: such tokens or sequences of the whole optimizer step, for the metrics: means of rho and of the weight,
            of the weight's square (see `effective_sample_share`), and the share with rho outside the bounds.
    """
    ratio_N = bounded_exp(log_ratio_N.where(mask_N, 0))
    outside_N = (ratio_N < low) | (ratio_N > high)
    match kind:
        case "truncate":
            weight_N = ratio_N.clamp(low, high)
        case "mask":
            weight_N = ratio_N.masked_fill(outside_N, 0)
        case _:
            assert_never(kind)
    weight_N = weight_N.where(mask_N, 0)

    def mean(values_N: torch.Tensor) -> torch.Tensor:
        return values_N.where(mask_N, 0).sum() / count

    return weight_N, {
        "sampler/ratio": mean(ratio_N),
        "sampler/ratio_outside": mean(outside_N.to(ratio_N)),
        "correction/weight": mean(weight_N),
        "correction/weight_squared": mean(weight_N**2),
    }


def effective_sample_share(metrics: Mapping[str, float]) -> float:
    """Effective sample size as a share of all, `(sum w)^2 / (n sum w^2)` (Kish 1965), in (0, 1]; 0 without weights.

    Args:
        metrics: of `correction_weights`, added up over the whole optimizer step.
    """
    squared = metrics["correction/weight_squared"]
    return metrics["correction/weight"] ** 2 / squared if squared else 0.0


@torch.no_grad()
def sampler_divergence(
    logprobs_T: torch.Tensor, sampler_T: torch.Tensor, mask_T: torch.Tensor, *, num_tokens: int
) -> dict[str, torch.Tensor]:
    """Estimates k1 and k3 of KL(sampler || policy) per completion token of the step."""
    log_ratio_T = (sampler_T - logprobs_T).where(mask_T, 0)
    return {f"sampler/kl_{name}": kl_estimate(log_ratio_T, name).sum() / num_tokens for name in ("k1", "k3")}
