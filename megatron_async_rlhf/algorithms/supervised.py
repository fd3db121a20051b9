"""Supervised fine-tuning: the warm start before RL. Shape legend: B sequences, T target tokens."""

import torch


def supervised_loss(
    logprobs_BT: torch.Tensor, mask_BT: torch.Tensor, *, num_tokens: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Negative log-likelihood of the completion tokens, averaged over `num_tokens` of the whole optimizer step.

    Args:
        logprobs_BT: log-probability of each target token, [B, T].
        mask_BT: 1 on completion tokens, 0 on prompt and padding, [B, T].
    """
    total = -(logprobs_BT * mask_BT).sum() / num_tokens
    return total, {"loss": total.detach()}
