"""Confidence intervals by the percentile bootstrap: prompts are drawn again, with replacement, and what they give is sorted.

A prompt is what is drawn, never a single answer: answers to one prompt are not independent of each other. Two systems on
the same prompts are compared by their differences per prompt, so that what makes a prompt hard counts for neither.

Reference: Efron & Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from msgspec import Struct
from numpy.typing import ArrayLike

_DRAWN_AT_ONCE = 2**20  # numbers; memory is a few times as much


class Interval(Struct, frozen=True, kw_only=True):
    """An estimate and its confidence interval.

    Attributes:
        n: prompts that it is from.
    """

    mean: float
    low: float
    high: float
    n: int


class Resampling(Struct, frozen=True, kw_only=True):
    """How intervals are made. One seed draws the same prompts for every quantity of the same number of prompts.

    Attributes:
        confidence: between 0 and 1; 0.95 leaves 2.5 % on either side.
    """

    confidence: float = 0.95
    resamples: int = 10_000
    seed: int = 0

    def mean(self, values: ArrayLike) -> Interval:
        """Of one value per prompt, [prompts].

        Raises:
            ValueError: there are no values, or not one for each prompt.
        """
        column = columns(values)[0]
        return self.interval(float(column.mean()), len(column), lambda drawn: column[drawn].mean(axis=1))

    def difference(self, ours: ArrayLike, theirs: ArrayLike) -> Interval:
        """Mean of ours minus theirs, of two systems on the same prompts, [prompts] each. Raises ValueError as `mean`."""
        left, right = columns(ours, theirs)
        return self.mean(left - right)

    def ratio(self, numerators: ArrayLike, denominators: ArrayLike) -> Interval:
        """Sum by sum, as of log-probabilities per token, where prompts have different numbers of tokens, [prompts] each.

        Raises:
            ValueError: as `mean`; or a denominator that is not positive.
        """
        above, below = columns(numerators, denominators)
        if not (below > 0).all():
            raise ValueError("a ratio needs denominators above 0")
        return self.interval(
            float(above.sum() / below.sum()),
            len(above),
            lambda drawn: above[drawn].sum(axis=1) / below[drawn].sum(axis=1),
        )

    def interval(self, estimate: float, n: int, statistic: Callable[[np.ndarray], np.ndarray]) -> Interval:
        """Of anything that can be computed from drawn prompts.

        Args:
            statistic: from positions of prompts, [resamples, prompts], to its value for each resample.
        """
        found = np.concatenate([statistic(drawn) for drawn in self._draws(n)])
        tail = (1 - self.confidence) / 2
        low, high = (float(np.quantile(found, share)) for share in (tail, 1 - tail))
        return Interval(mean=estimate, low=low, high=high, n=n)

    def _draws(self, n: int) -> Iterator[np.ndarray]:
        """Positions of `n` prompts, [some resamples, n], until there are enough."""
        generator = np.random.default_rng(self.seed)
        rows = max(_DRAWN_AT_ONCE // n, 1)
        for first in range(0, self.resamples, rows):
            yield generator.integers(n, size=(min(rows, self.resamples - first), n))


def columns(*values: ArrayLike) -> Sequence[np.ndarray]:
    """np.ndarray of the same prompts, one array each.

    Raises:
        ValueError: they differ in length, are empty, or are not one for each prompt.
    """
    arrays = [np.asarray(each, dtype=np.float64) for each in values]
    shapes = {array.shape for array in arrays}
    if len(shapes) > 1 or any(array.ndim != 1 or not len(array) for array in arrays):
        raise ValueError(f"one value for each of at least one prompt is needed, not arrays of {sorted(shapes)}")
    return arrays
