"""What becomes of completions that a reward gives no score."""

import logging
from collections.abc import Iterable
from typing import Literal

from megatron_async_rlhf.errors import RewardError
from megatron_async_rlhf.rewards.base import Score

_log = logging.getLogger(__name__)

OnError = Literal["fail", "zero"]


def scores_after(failure: str, count: int, on_error: OnError, key: str, *, way_out: str) -> list[Score]:
    """0 for each of `count` completions, which counts as failed.

    Args:
        failure: names the reward, what it did and the prompt.
        key: of the reward in the configuration.
        way_out: what can be done, besides letting them earn 0.

    Raises:
        RewardError: failures are to end the run.
    """
    if on_error == "fail":
        raise RewardError(f"{failure}. {way_out}, or set {key}.on_error = zero") from None
    return [failed_score(failure)] * count


def failed_score(failure: str, metrics: Iterable[str] = ()) -> Score:
    """0, which counts as failed, and goes into the log.

    Args:
        metrics: that the reward has besides; 0 too.
    """
    _log.error("%s", failure)
    return Score(reward=0.0, metrics=dict.fromkeys(metrics, 0.0) | {"reward_failed": 1.0}, failure=failure)


def plain_scores(scores: list[float], on_error: OnError) -> list[Score]:
    """With the metric that says that they did not fail, where they might have."""
    return [Score(reward=score, metrics={"reward_failed": 0.0} if on_error == "zero" else {}) for score in scores]
