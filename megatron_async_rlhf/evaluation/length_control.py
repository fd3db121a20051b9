"""A win rate as it would be if both sides' answers were equally long, by the model of AlpacaEval 2.

    P(win) = sigmoid(quality + effect * tanh(d / s))

with `d` the difference in length (ours minus theirs) and `s` its standard deviation over the prompts; the length-controlled
win rate is sigmoid(quality), what the fitted model says at d = 0. A tie enters as half a win.

Reference: Dubois, Galambosi, Liang & Hashimoto, Length-Controlled AlpacaEval: A Simple Way to Debias Automatic Evaluators
(2024), arXiv:2404.04475, equation 2. Its third term, how hard each instruction is, is fitted over a leaderboard of many
models; of a single pair it cannot be distinguished from the other two, and is left out. A weak ridge keeps the fit finite where the
sign of `d` decides every win.
"""

import numpy as np
from numpy.typing import ArrayLike

from megatron_async_rlhf.evaluation.bootstrap import Interval, Resampling, columns

RIDGE = 1e-2  # of half the squared coefficients, beside a log-likelihood that is summed over prompts
_ITERATIONS, _CLOSE = 50, 1e-8
_LARGEST_STEP = 2.0  # in either coefficient: Newton's method overshoots where sigmoid is flat


def length_controlled_win_rate(
    won: ArrayLike, our_lengths: ArrayLike, their_lengths: ArrayLike, resampling: Resampling
) -> Interval:
    """
    Args:
        won: of each prompt, between 0 and 1, [prompts].
        our_lengths: of each answer, in any unit, [prompts].

    Raises:
        ValueError: there are no prompts, or not the same number everywhere.
    """
    outcome, ours, theirs = columns(won, our_lengths, their_lengths)
    feature = _feature(ours - theirs)
    best = _fit(feature[None], outcome[None], np.zeros((1, 2)))

    def statistic(drawn: np.ndarray) -> np.ndarray:
        start = np.broadcast_to(best, (len(drawn), 2))
        return _sigmoid(_fit(feature[drawn], outcome[drawn], start)[:, 0])

    return resampling.interval(float(_sigmoid(best[0, 0])), len(outcome), statistic)


def _feature(difference: np.ndarray) -> np.ndarray:
    spread = difference.std()
    return np.tanh(difference / spread) if spread > 0 else np.zeros_like(difference)


def _fit(feature: np.ndarray, outcome: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Quality and effect of length by Newton's method, [fits, 2].

    Args:
        feature: [fits, prompts], as `outcome`.
    """
    found = start.copy()
    for _ in range(_ITERATIONS):
        chance = _sigmoid(found[:, :1] + found[:, 1:] * feature)
        rest, weight = outcome - chance, chance * (1 - chance)
        slope = np.stack([rest.sum(1), (rest * feature).sum(1)], axis=1) - RIDGE * found
        diagonal, corner = weight.sum(1) + RIDGE, (weight * feature).sum(1)
        other = (weight * feature**2).sum(1) + RIDGE
        determinant = diagonal * other - corner**2  # above 0, because of the ridge
        step = np.stack(
            [other * slope[:, 0] - corner * slope[:, 1], diagonal * slope[:, 1] - corner * slope[:, 0]], axis=1
        )
        step = np.clip(step / determinant[:, None], -_LARGEST_STEP, _LARGEST_STEP)
        found += step
        if np.abs(step).max() < _CLOSE:
            break
    return found


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-values))
