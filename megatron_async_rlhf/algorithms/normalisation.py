"""What a token's loss counts for in the mean over an optimizer step.

Token-level losses multiply with these shares and add up: since the denominators are the whole step's, the sum over
micro-batches and ranks is the step's loss, however its sequences are spread over them.
Shape legend: T tokens of a micro-batch's row.
"""

from typing import Literal, assert_never

import torch

from megatron_async_rlhf.algorithms.segments import Segments

Normalisation = Literal["token", "sequence", "constant"]


def token_weights(
    segments: Segments,
    normalisation: Normalisation,
    *,
    num_tokens: int,
    num_sequences: int,
    length: int = 1,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Share of each completion token, 0 elsewhere, [T].

    - `token`: `1 / num_tokens`, all tokens of the step alike (PPO; DAPO, Yu et al. 2025, arXiv 2503.14476, section
      3.3). The paper's PPO code takes this mean inside each micro-batch and averages the micro-batches, so that its
      loss depends on how sequences are grouped; ours does not.
    - `sequence`: mean over each completion, then over sequences, `1 / (|y| num_sequences)` (GRPO, Shao et al. 2024,
      arXiv 2402.03300). An empty completion counts as a sequence with loss 0.
    - `constant`: `1 / (length num_sequences)` (Dr. GRPO, Liu et al. 2025, arXiv 2503.20783, with `length` the longest
      completion allowed). `length=1` sums over each completion, as sequence-level losses do.

    Args:
        num_tokens, num_sequences: completion tokens and real sequences of the whole optimizer step over all
            micro-batches and ranks: the denominators.
    """
    ones_T = torch.ones(len(segments.mask_T), dtype=dtype, device=segments.mask_T.device)
    match normalisation:
        case "token":
            return segments.keep(ones_T / num_tokens)
        case "sequence":
            return segments.spread(1 / (segments.lengths(ones_T).clamp(min=1) * num_sequences))
        case "constant":
            return segments.keep(ones_T / (length * num_sequences))
        case _:
            assert_never(normalisation)
