"""Means over seeds against numbers worked out by hand."""

import math
from statistics import stdev

import pytest

from megatron_async_rlhf.compare.estimates import Estimate, mean_of, ratio_of, transformed


def test_an_interval_of_three_seeds_is_students():
    estimate = mean_of([1.0, 2.0, 3.0])  # deviation 1, so half = 4.303 / sqrt(3)
    assert estimate.mean == 2.0 and estimate.seeds == 3
    assert (estimate.low, estimate.high) == (pytest.approx(2 - 2.4843, abs=1e-4), pytest.approx(2 + 2.4843, abs=1e-4))


def test_one_seed_has_no_interval():
    assert mean_of([0.5]) == Estimate(mean=0.5, low=None, high=None, seeds=1)


@pytest.mark.parametrize(("seeds", "quantile"), [(31, 2.042), (32, 2.0395), (100, 1.9842), (10000, 1.9602)])
def test_many_seeds_are_students_too(seeds: int, quantile: float):
    values = [float(seed % 2) for seed in range(seeds)]
    estimate = mean_of(values)
    assert estimate.high - estimate.mean == pytest.approx(quantile * stdev(values) / math.sqrt(seeds), rel=1e-4)


def test_ratios_say_the_same_either_way_round():
    ratios = [1.5, 2.0, 1.8]
    there, back = ratio_of(ratios), ratio_of([1 / ratio for ratio in ratios])
    assert there.mean == pytest.approx(math.prod(ratios) ** (1 / 3))
    assert back.mean == pytest.approx(1 / there.mean)
    assert (back.low, back.high) == (pytest.approx(1 / there.high), pytest.approx(1 / there.low))


def test_a_falling_function_swaps_the_ends():
    saved = transformed(ratio_of([2.0, 2.5]), lambda ratio: -ratio)
    assert saved.low < saved.mean < saved.high


@pytest.mark.parametrize(
    ("values", "above_one"), [([1.5, 1.51, 1.52], True), ([0.9, 0.91, 0.9], False), ([0.5, 1.5], None), ([1.2], True), ([1.0], None)]
)  # fmt: skip
def test_above_means_the_whole_interval(values: list[float], above_one: bool | None):
    assert mean_of(values).is_above(1.0) is above_one
