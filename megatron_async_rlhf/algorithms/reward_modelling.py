"""Reward modelling: a scalar for each completion, such that of two the better one has the higher (Bradley-Terry).

The model of Bradley and Terry (1952) gives a comparison the probability `sigmoid(r_chosen - r_rejected)`; the loss is the
negative log-likelihood of the comparisons (InstructGPT, arXiv 2203.02155, eq. 1). The margin is Llama 2's (arXiv
2307.09288, eq. 2), the centring term that of Eisenstein et al. (arXiv 2312.09244).
Shape legend: P preference pairs of one micro-batch.
"""

import torch
import torch.nn.functional as F


def bradley_terry_loss(
    chosen_P: torch.Tensor,
    rejected_P: torch.Tensor,
    weight_P: torch.Tensor,
    *,
    margin_P: torch.Tensor | None = None,
    center_coefficient: float = 0.0,
    num_pairs: int,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Sum over pairs of `-log sigmoid(r_chosen - r_rejected - margin) + c (r_chosen + r_rejected)^2`, over `num_pairs`.

    The first term does not change when all rewards grow by the same; the second, with `c` small, keeps them around 0.

    Args:
        chosen_P, rejected_P: rewards, [P].
        weight_P: 1 for a real pair, 0 for padding, [P].
        margin_P: by how much the chosen reward is to be the higher one, [P]; None for 0.
        center_coefficient: c.
        num_pairs: pairs in the whole optimizer step over all micro-batches and ranks: the denominator.
    """
    margins_P = chosen_P - rejected_P
    above_P = margins_P if margin_P is None else margins_P - margin_P
    losses_P = -F.logsigmoid(above_P)
    if center_coefficient:
        losses_P = losses_P + center_coefficient * (chosen_P + rejected_P) ** 2
    total = (losses_P * weight_P).sum() / num_pairs

    def mean(values_P: torch.Tensor) -> torch.Tensor:
        return (values_P * weight_P).sum().detach() / num_pairs

    return total, {
        "loss": total.detach(),
        "pairs/accuracy": mean((margins_P > 0).to(chosen_P)),
        "pairs/margin": mean(margins_P),
        "pairs/chosen_reward": mean(chosen_P),
        "pairs/rejected_reward": mean(rejected_P),
    }
