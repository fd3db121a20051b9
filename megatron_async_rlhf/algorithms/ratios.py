"""Ratios of two policies' probabilities for the same tokens, from their log-probabilities.

Shape legend: T tokens of a micro-batch's row.
"""

from typing import Literal, assert_never

import torch

from megatron_async_rlhf.algorithms.segments import Segments

RatioLevel = Literal["token", "sequence", "sequence_token"]

# A ratio beyond e^20 says that the two policies have nothing in common. Without a bound, one such sequence overflows
# the loss of the whole step; beyond it the ratio is constant and passes no gradient.
LARGEST_LOG_RATIO = 20.0


def bounded_exp(log_ratio: torch.Tensor) -> torch.Tensor:
    """`exp` of a log-ratio of any shape, held within e^-20 and e^20."""
    return log_ratio.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()


def policy_log_ratio(
    logprobs_T: torch.Tensor, base_T: torch.Tensor, segments: Segments, level: RatioLevel
) -> torch.Tensor:
    """`log pi / pi_base` that multiplies each token's advantage, 0 off completion tokens, [T].

    - `token`: of the token itself (PPO, GRPO).
    - `sequence`: the mean over the completion, so that the ratio is a geometric mean (GSPO, Zheng et al. 2025, arXiv
      2507.18071).
    - `sequence_token`: the value of `sequence` and the gradient of `token` (GSPO-token), which lets the
      advantage differ within a sequence.

    Args:
        logprobs_T: of the policy being trained.
        base_T: of the policy that the ratio is taken against; constant.
    """
    own_T = segments.keep(logprobs_T - base_T.detach())
    match level:
        case "token":
            return own_T
        case "sequence":
            return segments.spread(segments.mean(own_T))
        case "sequence_token":
            mean_T = segments.spread(segments.mean(own_T))
            return mean_T.detach() + own_T - own_T.detach()
        case _:
            assert_never(level)
