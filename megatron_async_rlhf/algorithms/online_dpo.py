"""Online DPO: direct preference optimisation on the policy's own best and worst samples.

Guo et al. 2024 (arXiv 2402.04792); the asynchronous form is Noukhovitch et al. (arXiv 2410.18252, section 3).
Shape legend: P preference pairs of one micro-batch.
"""

from typing import Literal, assert_never

import torch
import torch.nn.functional as F


def online_dpo_loss(
    policy_chosen_P: torch.Tensor,
    policy_rejected_P: torch.Tensor,
    reference_chosen_P: torch.Tensor,
    reference_rejected_P: torch.Tensor,
    weight_P: torch.Tensor,
    *,
    beta: float,
    loss: Literal["sigmoid", "ipo"],
    num_pairs: int,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Sum of pair losses over `num_pairs`, and the same for its metrics.

    sigmoid: `-log sigmoid(beta h)`; ipo: `(h - 1 / (2 beta))^2` (Azar et al. 2023, eq. 17), with
    `h = log pi(y+)/pi_ref(y+) - log pi(y-)/pi_ref(y-)`.

    Args:
        policy_*, reference_*: log-probability of the whole completion (summed over its tokens), [P].
        weight_P: 1 for a real pair, 0 for padding, [P].
        num_pairs: pairs in the whole optimizer step over all micro-batches and ranks: the denominator.
    """
    chosen_ratio_P = policy_chosen_P - reference_chosen_P
    rejected_ratio_P = policy_rejected_P - reference_rejected_P
    h_P = chosen_ratio_P - rejected_ratio_P
    match loss:
        case "sigmoid":
            losses_P = -F.logsigmoid(beta * h_P)
        case "ipo":
            losses_P = (h_P - 1 / (2 * beta)) ** 2
        case _:
            assert_never(loss)
    total = (losses_P * weight_P).sum() / num_pairs

    def mean(values_P: torch.Tensor) -> torch.Tensor:
        return (values_P * weight_P).sum().detach() / num_pairs

    metrics = {
        "loss": total.detach(),
        "dpo/margin": mean(beta * h_P),
        "dpo/accuracy": mean((h_P > 0).float()),
        "dpo/chosen_ratio": mean(beta * chosen_ratio_P),
        "dpo/rejected_ratio": mean(beta * rejected_ratio_P),
        # k1 estimate of KL(policy || reference) per completion, on the pairs trained
        "kl_to_reference": mean((chosen_ratio_P + rejected_ratio_P) / 2),
    }
    return total, metrics
