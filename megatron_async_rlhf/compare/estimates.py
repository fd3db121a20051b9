"""Means over seeds with confidence intervals. Each seed is one observation, so intervals are Student's.

Runs of one seed share prompts and their order, so a schedule is compared with another seed by seed: what makes a seed hard
counts for neither.
"""

import math
from collections.abc import Callable, Sequence
from statistics import fmean, stdev

from msgspec import Struct

# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom, and of the normal distribution.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
      2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)  # fmt: skip
_NORMAL = 1.960


class Estimate(Struct, frozen=True, kw_only=True):
    """A mean over seeds.

    Attributes:
        low, high: of its confidence interval; None with a single seed, which says nothing of others.
        seeds: how many.
    """

    mean: float
    low: float | None
    high: float | None
    seeds: int

    def is_above(self, value: float) -> bool | None:
        """Whether the whole interval is above, or below (False); None if it is neither."""
        low, high = (self.mean, self.mean) if self.low is None or self.high is None else (self.low, self.high)
        return True if low > value else False if high < value else None


def _of_many(degrees: int) -> float:
    """The quantile beyond the table: the expansion for many degrees of freedom (Abramowitz and Stegun, 26.7.5), two terms."""
    x = _NORMAL
    return x + (x**3 + x) / (4 * degrees) + (5 * x**5 + 16 * x**3 + 3 * x) / (96 * degrees**2)


def mean_of(values: Sequence[float]) -> Estimate:
    """Of one value per seed."""
    if len(values) < 2:
        return Estimate(mean=values[0], low=None, high=None, seeds=1)
    degrees = len(values) - 1
    quantile = _T[degrees - 1] if degrees <= len(_T) else _of_many(degrees)
    mean, half = fmean(values), quantile * stdev(values) / math.sqrt(len(values))
    return Estimate(mean=mean, low=mean - half, high=mean + half, seeds=len(values))


def ratio_of(values: Sequence[float]) -> Estimate:
    """Of one ratio per seed, each above 0: geometric mean, so that a over b and b over a say the same."""
    return transformed(mean_of([math.log(value) for value in values]), math.exp)


def transformed(estimate: Estimate, function: Callable[[float], float]) -> Estimate:
    """Of a monotonic function of what was estimated."""
    ends = [None if end is None else function(end) for end in (estimate.low, estimate.high)]
    low, high = ends if ends[0] is None or ends[1] is None or ends[0] <= ends[1] else ends[::-1]
    return Estimate(mean=function(estimate.mean), low=low, high=high, seeds=estimate.seeds)
