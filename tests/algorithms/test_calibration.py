import math
import random

import pytest

from megatron_async_rlhf.algorithms.calibration import calibration, pair_figures, wilson_interval


def test_wilson_by_hand():
    # 8 of 10, z = 1.96: centre (0.8 + 0.19208) / 1.38416 = 0.716738; half 1.96 / 1.38416 sqrt(0.016 + 0.009604) = 0.226578
    low, high = wilson_interval(8, 10, z=1.96)
    assert (low, high) == pytest.approx((0.490160, 0.943316), abs=1e-5)
    assert wilson_interval(10, 10)[1] == pytest.approx(1.0) and wilson_interval(10, 10)[0] < 0.75
    assert wilson_interval(0, 10)[0] == 0.0 < wilson_interval(0, 10)[1]


def test_the_interval_covers_the_share_about_as_often_as_it_says():
    dice = random.Random(0)
    hits = 0
    for _ in range(2000):
        low, high = wilson_interval(sum(dice.random() < 0.8 for _ in range(60)), 60)
        hits += low <= 0.8 <= high
    assert 0.93 <= hits / 2000 <= 0.97


def test_calibration_by_hand():
    # Confidence sigmoid(|m|): 0.524979 (m = 0.1, right) and 0.549834 (m = -0.2, wrong) are in the first bin, [0.50, 0.55);
    # 0.952574 (m = 3, right) in the last. Gaps |1/2 - 0.537407| and |1 - 0.952574|, weighed 2/3 and 1/3.
    found = calibration([0.1, -0.2, 3.0])
    assert found["calibration/0.50/pairs"] == 2.0
    assert found["calibration/0.50/confidence"] == pytest.approx(0.537407, abs=1e-6)
    assert found["calibration/0.50/accuracy"] == 0.5
    assert found["calibration/0.95/accuracy"] == 1.0
    assert found["calibration_error"] == pytest.approx((2 * 0.037407 + 0.047426) / 3, abs=1e-6)
    assert not any(name.startswith("calibration/0.6") for name in found)


def test_outcomes_drawn_as_predicted_are_calibrated_and_inflated_margins_are_not():
    dice = random.Random(1)
    sizes = [abs(dice.gauss(0, 1.5)) for _ in range(20000)]
    margins = [size if dice.random() < 1 / (1 + math.exp(-size)) else -size for size in sizes]
    assert calibration(margins)["calibration_error"] < 0.02
    assert calibration([5 * margin for margin in margins])["calibration_error"] > 0.15


def test_figures_of_a_few_pairs():
    found = pair_figures([1.0, 2.0, 0.5, 0.0], [0.0, 0.0, 0.5, 4.0])
    assert (found["pairs"], found["accuracy"]) == (4.0, 0.5)  # the third is a tie
    assert found["accuracy_low"] < 0.5 < found["accuracy_high"]
    assert found["margin_mean"] == pytest.approx(-0.25)
    assert (found["chosen_reward_mean"], found["rejected_reward_mean"]) == (0.875, 1.125)
    assert found["reward_mean"] == pytest.approx(1.0)
    assert found["reward_p50"] == pytest.approx(0.5)
    losses = [math.log1p(math.exp(-margin)) for margin in (1.0, 2.0, 0.0, -4.0)]
    assert found["loss"] == pytest.approx(sum(losses) / 4)


@pytest.mark.parametrize("apart", [1e4, -1e4])
def test_one_pair_far_apart(apart: float):
    found = pair_figures([apart], [0.0])
    assert found["loss"] == pytest.approx(max(-apart, 0.0))
    assert all(math.isfinite(value) for value in found.values())
    assert found["calibration_error"] == pytest.approx(0.0 if apart > 0 else 1.0)
