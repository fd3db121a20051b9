"""KL(policy || reference) from sampled tokens: as a penalty in the reward, or as a term of the loss.

Estimators of Schulman 2020 (http://joschu.net/blog/kl-approx.html) with `d = log pi - log pi_ref` of a token that the
policy sampled: k1 `d`; k2 `d^2 / 2`; k3 `exp(-d) - 1 + d`. k1 and k3 are unbiased, k2 and k3 never negative.
Shape legend: T tokens of a micro-batch's row.
"""

from typing import Literal, assert_never

import torch

from megatron_async_rlhf.algorithms.ratios import bounded_exp

Estimator = Literal["k1", "k2", "k3"]
Gradient = Literal["policy", "estimator"]


def kl_estimate(log_ratio: torch.Tensor, estimator: Estimator) -> torch.Tensor:
    """Estimate of KL(policy || reference) at each token from `log pi - log pi_ref`, of any shape; differentiable."""
    match estimator:
        case "k1":
            return log_ratio
        case "k2":
            return log_ratio**2 / 2
        case "k3":
            return bounded_exp(-log_ratio) - 1 + log_ratio
        case _:
            assert_never(estimator)


def kl_penalty(
    logprobs_T: torch.Tensor,
    reference_T: torch.Tensor,
    mask_T: torch.Tensor,
    *,
    coefficient: float,
    estimator: Estimator = "k1",
) -> torch.Tensor:
    """`-coefficient KL` to add to each completion token's reward (PPO), or its sum to the score (RLOO); constant, [T].

    The paper's: k1, coefficient 0.05, `logprobs_T` of the proximal policy (its code never knows the sampler's).
    """
    log_ratio_T = (logprobs_T - reference_T).detach().where(mask_T, 0)
    return -coefficient * kl_estimate(log_ratio_T, estimator)


def kl_loss(
    logprobs_T: torch.Tensor,
    reference_T: torch.Tensor,
    token_weights_T: torch.Tensor,
    mask_T: torch.Tensor,
    weight_T: torch.Tensor | None = None,
    *,
    estimator: Estimator = "k3",
    gradient: Gradient = "policy",
    num_tokens: int,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Sum of `share w KL`: a term to add to a policy loss, times its coefficient.

    The tokens were sampled from the policy, so its change moves their distribution too, which differentiating an
    estimator forgets: in expectation k1's own gradient is 0 and k3's is that of KL(reference || policy); only k2's is
    right (Tang and Munos 2025, arXiv 2506.09477).

    Args:
        reference_T: constant, [T].
        token_weights_T: see `normalisation.token_weights`, [T].
        mask_T: True on completion tokens, bool, [T].
        weight_T: constant; None for 1. For tokens of another policy, `pi / pi_sampler` keeps the estimate and, with
            `gradient="policy"`, the gradient unbiased (the KL term of DeepSeek-V3.2, arXiv 2512.02556), [T].
        gradient: `policy` for `w (log pi - log pi_ref) grad log pi`, that of the KL, whatever the estimator;
            `estimator` to differentiate the estimator as it is (with k3: GRPO, and the `beta` term of the paper's
            later RLOO code, with the normalisation `constant` of length 1).
        num_tokens: completion tokens of the whole optimizer step, for the metrics.
    """
    log_ratio_T = (logprobs_T - reference_T.detach()).where(mask_T, 0)
    estimates_T = kl_estimate(log_ratio_T, estimator)
    mean = estimates_T.detach().sum() / num_tokens
    match gradient:
        case "policy":
            right_T = kl_estimate(log_ratio_T, "k2")
            estimates_T = estimates_T.detach() + right_T - right_T.detach()
        case "estimator":
            pass
        case _:
            assert_never(gradient)
    if weight_T is not None:
        estimates_T = estimates_T * weight_T.detach().where(mask_T, 0)
    total = (estimates_T * token_weights_T).sum()
    return total, {"kl_loss": total.detach(), "kl/per_token": mean}
