"""Best-of-N fine-tuning: supervised learning on the best of the policy's own N samples.

The baseline of Noukhovitch et al. (arXiv 2410.18252, section 3.3) with N = 2, which has as many samples as Online DPO
but no negative ones and no KL. Shape legend: S sequences of one micro-batch.
"""

import torch


def best_of_n_loss(
    policy_S: torch.Tensor, mask_S: torch.Tensor, *, num_sequences: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Negative log-likelihood of the whole best completion, summed over its tokens, averaged over `num_sequences`.

    With the mean over all tokens instead, this is `supervised.supervised_loss`. The paper's code trains on the first
    sample when all rewards are equal.

    Args:
        policy_S: log-probability of each prompt's best completion, [S].
        mask_S: True for a real sequence, bool, [S].
        num_sequences: real sequences of the whole optimizer step: the denominator.
    """
    total = -policy_S.where(mask_S, 0).sum() / num_sequences
    return total, {"loss": total.detach()}
