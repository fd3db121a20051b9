"""How often one system's answer is better than another's to the same prompt."""

import numpy as np
from numpy.typing import ArrayLike

from megatron_async_rlhf.evaluation.bootstrap import Interval, Resampling


def wins(ours: ArrayLike, theirs: ArrayLike) -> np.ndarray:
    """1 where our score is higher, 0 where theirs is, 0.5 for a tie; of any one shape.

    Raises:
        ValueError: the shapes differ.
    """
    left, right = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    if left.shape != right.shape:
        raise ValueError(f"scores are paired: {left.shape} of ours and {right.shape} of theirs are not")
    return (np.sign(left - right) + 1) / 2


def win_rate(ours: ArrayLike, theirs: ArrayLike, resampling: Resampling) -> Interval:
    """Share of answers that win, ties counted half.

    Args:
        ours: score of each answer, [prompts] or [prompts, samples]; the n-th sample of one side meets the n-th of the other.
    """
    outcomes = wins(ours, theirs)
    return resampling.mean(outcomes if outcomes.ndim == 1 else outcomes.mean(axis=1))
