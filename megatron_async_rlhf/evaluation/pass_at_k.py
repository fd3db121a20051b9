"""pass@k: the chance that one of k answers to a prompt is right."""

import math

import numpy as np
from numpy.typing import ArrayLike


def pass_at_k(right: ArrayLike, k: int) -> np.ndarray:
    """The unbiased estimate from n >= k answers to each prompt, c of them right: 1 - C(n-c, k) / C(n, k), [prompts].

    Reference: Chen et al., Evaluating Large Language Models Trained on Code (2021), arXiv:2107.03374, section 2.1.

    Args:
        right: whether each answer is, [prompts, n].

    Raises:
        ValueError: k is not between 1 and n.
    """
    answers = np.asarray(right, dtype=bool)
    n = answers.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {max(k, 1)} answers to a prompt and k from 1 on, not {n} answers")
    return np.array([1 - math.comb(n - int(c), k) / math.comb(n, k) for c in answers.sum(axis=1)])
