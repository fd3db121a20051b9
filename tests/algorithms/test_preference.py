import pytest

from megatron_async_rlhf.algorithms.preference import best_and_worst


@pytest.mark.parametrize(
    ("rewards", "pair"),
    [
        ([1.0, 0.0], (0, 1)),
        ([0.0, 1.0], (1, 0)),
        ([0.3, 0.9, -1.0, 0.5], (1, 2)),
        ([-5.0, -1.0, -3.0], (1, 0)),
    ],
)
def test_highest_against_lowest(rewards: list[float], pair: tuple[int, int]):
    assert best_and_worst(rewards) == pair


@pytest.mark.parametrize(
    ("rewards", "pair"),
    [
        ([0.5, 1.0, 1.0], (1, 0)),
        ([1.0, 0.0, 0.0], (0, 1)),
        ([0.0, 1.0, 0.0, 1.0], (1, 0)),
        ([1.0, 1.0, 0.0, 0.0], (0, 2)),
    ],
)
def test_the_first_of_equals_wins(rewards: list[float], pair: tuple[int, int]):
    assert best_and_worst(rewards) == pair


@pytest.mark.parametrize("rewards", [[0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [-1.0] * 3, [0.0, -0.0], [2.0]])
def test_a_tie_is_no_preference(rewards: list[float]):
    assert best_and_worst(rewards) is None
