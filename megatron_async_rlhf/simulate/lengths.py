"""How long completions are: what a simulated generator draws from."""

import math
from collections.abc import Sequence
from random import Random
from statistics import NormalDist, fmean
from typing import Protocol

from megatron_async_rlhf.errors import ConfigError


class Lengths(Protocol):
    """A distribution of completion lengths."""

    name: str

    def draw(self, random: Random) -> int:
        """Tokens, at least 1; more than the limit is cut off by who asks."""
        ...


class ConstantLength:
    """All the same."""

    def __init__(self, tokens: int) -> None:
        self.name, self._tokens = f"{tokens} tokens", tokens

    def draw(self, random: Random) -> int:
        return self._tokens


class LognormalLengths:
    """A long tail: `sigma` is of the logarithm; 0.5 is mild, 1 is wild."""

    def __init__(self, mean: float, sigma: float, limit: int | None = None) -> None:
        """
        Args:
            limit: at which they will be cut off; then it is the mean of what is left that is `mean`.
        """
        self.name = f"lognormal, {mean:g} tokens on average, sigma {sigma:g}"
        self._mu, self._sigma = math.log(mean) - sigma**2 / 2, sigma
        if limit is not None and sigma:
            self._mu = _location(min(mean, 0.999 * limit), sigma, limit)

    def draw(self, random: Random) -> int:
        return max(1, round(random.lognormvariate(self._mu, self._sigma)))


def _location(mean: float, sigma: float, limit: int) -> float:
    """Mean of the logarithm with which lengths that are cut off at a limit have this mean."""

    def cut(mu: float) -> float:
        beyond = NormalDist(mu, sigma)
        below = NormalDist(mu + sigma**2, sigma).cdf(math.log(limit))
        return math.exp(mu + sigma**2 / 2) * below + limit * (1 - beyond.cdf(math.log(limit)))

    low, high = math.log(mean) - sigma**2 / 2, math.log(limit) + 10 * sigma
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if cut(middle) < mean else (low, middle)
    return (low + high) / 2


class MeasuredLengths:
    """One of those that were seen, longer or shorter so that their mean is `mean`."""

    def __init__(self, seen: Sequence[int], where: str, mean: float) -> None:
        self.name = f"{len(seen)} measured in {where}, {mean:.1f} tokens on average"
        self._seen = [max(1, length) for length in seen]
        self._scale = mean / fmean(self._seen)

    def draw(self, random: Random) -> int:
        seen = self._seen[int(random.random() * len(self._seen))]
        return max(1, math.floor(self._scale * seen + random.random()))


def parse_lengths(text: str) -> Lengths:
    """`constant:TOKENS` or `lognormal:MEAN:SIGMA`.

    Raises:
        ConfigError: neither.
    """
    kind, *numbers = text.split(":")
    try:
        if kind == "constant" and len(numbers) == 1 and int(numbers[0]) >= 1:
            return ConstantLength(int(numbers[0]))
        if kind == "lognormal" and len(numbers) == 2 and float(numbers[0]) >= 1 and float(numbers[1]) >= 0:
            return LognormalLengths(float(numbers[0]), float(numbers[1]))
    except ValueError:
        pass
    raise ConfigError(f"--lengths {text}: must be constant:TOKENS or lognormal:MEAN:SIGMA, such as lognormal:200:0.6")
