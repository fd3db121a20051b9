"""Changes to rewards before advantages are made of them. Plain Python: the controller scores, the learner trains."""

from collections.abc import Sequence
from math import sqrt
from statistics import mean

from msgspec import Struct


class RewardMoments(Struct, frozen=True):
    """Mean and spread of the rewards seen so far; part of a run's state where they run on over steps.

    Attributes:
        squares: sum of squared distances from the mean.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def including(self, rewards: Sequence[float]) -> "RewardMoments":
        """With more rewards (Chan et al. 1979); equal rewards have no spread, exactly."""
        if not rewards:
            return self
        centre, count = mean(rewards), self.count + len(rewards)
        shift = centre - self.mean
        squares = sum((reward - centre) ** 2 for reward in rewards)
        return RewardMoments(
            count=count,
            mean=self.mean + shift * (len(rewards) / count),  # this order adds equal rewards up exactly
            squares=self.squares + squares + shift**2 * self.count * len(rewards) / count,
        )

    @property
    def std(self) -> float:
        """Sample standard deviation; 0 below two rewards."""
        return sqrt(self.squares / (self.count - 1)) if self.count > 1 else 0.0


def scale_rewards(rewards: Sequence[float], moments: RewardMoments, *, shift: bool) -> list[float]:
    """Rewards divided by their standard deviation, after taking off the mean if `shift`; undivided if that is 0.

    Args:
        moments: `RewardMoments().including(rewards)` scales by the batch, `previous.including(rewards)` by all so far.
    """
    centre, divisor = moments.mean if shift else 0.0, moments.std or 1.0
    return [(reward - centre) / divisor for reward in rewards]


def soft_overlong_penalty(length: int, *, max_length: int, buffer: int) -> float:
    """What to add to the reward for length: from 0 at `max_length - buffer` tokens down to -1 at `max_length`.

    DAPO (arXiv 2503.14476, eq. 13), with 20480 and 4096.
    """
    free = max_length - buffer
    return max(-1.0, min(0.0, (free - length) / buffer))
