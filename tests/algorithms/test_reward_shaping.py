import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_async_rlhf.algorithms.reward_shaping import RewardMoments, scale_rewards, soft_overlong_penalty

REWARDS = st.lists(st.floats(-10, 10), min_size=2, max_size=20)


@given(st.lists(REWARDS, min_size=1, max_size=4), st.booleans())
def test_running_moments_are_those_of_all_rewards_so_far(batches: list[list[float]], shift: bool):
    moments = RewardMoments()
    for batch in batches:
        moments = moments.including(batch)
    everything = sum(batches, [])
    assert moments.count == len(everything)
    assert moments.mean == pytest.approx(statistics.mean(everything), abs=1e-9)
    assert moments.std == pytest.approx(statistics.stdev(everything), abs=1e-6)
    if statistics.stdev(everything) > 1e-3:
        centre = statistics.mean(everything) if shift else 0.0
        expected = [(reward - centre) / statistics.stdev(everything) for reward in batches[-1]]
        assert scale_rewards(batches[-1], moments, shift=shift) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("reward", [0.0, 0.1, -1 / 3, 1e6])
@pytest.mark.parametrize("count", [1, 3, 7])
def test_equal_rewards_stay_as_they_are_or_become_zero(reward: float, count: int):
    rewards = [reward] * count
    moments = RewardMoments().including(rewards).including(rewards)
    assert scale_rewards(rewards, moments, shift=False) == rewards
    assert scale_rewards(rewards, moments, shift=True) == [0.0] * count


def test_no_rewards_change_nothing():
    moments = RewardMoments().including([1.0, 2.0])
    assert moments.including([]) == moments
    assert scale_rewards([], RewardMoments(), shift=True) == []


@pytest.mark.parametrize(
    ("length", "penalty"), [(0, 0.0), (75, 0.0), (76, -0.04), (80, -0.2), (100, -1.0), (101, -1.0), (10**6, -1.0)]
)
def test_overlong_penalty_falls_over_the_buffer(length: int, penalty: float):
    assert soft_overlong_penalty(length, max_length=100, buffer=25) == pytest.approx(penalty)
