"""Micro-batches from lengths: rules for any lengths, and how full and even they are on real ones."""

import json
import random
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_async_rlhf.data.packing import plan_bins

GSM8K = Path(__file__).parents[2].parent / "shared/data/gsm8k/train.jsonl"
BUDGET, UNITS = 4096, 512

many_lengths = st.lists(st.one_of(st.integers(1, 30), st.integers(1, 300)), max_size=60)


@settings(deadline=None, max_examples=200)
@given(many_lengths, st.integers(1, 150), st.integers(1, 5))
def test_a_plan_is_complete_within_budget_in_step_and_repeatable(lengths: list[int], budget: int, ranks: int):
    plan = plan_bins(lengths, budget, ranks)
    bins = [one for rank in plan for one in rank]
    assert sorted(unit for one in bins for unit in one) == list(range(len(lengths)))
    assert all(len(one) == 1 or sum(lengths[unit] for unit in one) <= budget for one in bins)
    assert len(plan) == ranks
    assert len({len(rank) for rank in plan}) == 1
    assert plan[0], "every rank takes part in every collective"
    assert plan == plan_bins(list(lengths), budget, ranks)


@settings(deadline=None, max_examples=200)
@given(many_lengths, st.integers(1, 150), st.integers(1, 5))
def test_no_more_bins_than_half_full_ones_would_be(lengths: list[int], budget: int, ranks: int):
    """Of two bins that best fit opened, the units exceed one budget; ranks in step add less than one bin each."""
    bins = sum(len(rank) for rank in plan_bins(lengths, budget, ranks))
    assert bins < 2 * sum(min(length, budget) for length in lengths) / budget + 1 + ranks


def gsm8k() -> list[int]:
    """A quarter of the bytes of question and answer: about the tokens of each problem."""
    if not GSM8K.is_file():
        pytest.skip(f"the GSM8K problems are not at {GSM8K}")
    problems = [json.loads(line) for line in GSM8K.read_text().splitlines()]
    return [len((problem["question"] + problem["answer"]).encode()) // 4 + 1 for problem in problems]


def gsm8k_pairs() -> list[int]:
    return [2 * chosen + (rejected - chosen) // 2 for chosen, rejected in pairwise(gsm8k())]


def long_tailed() -> list[int]:
    """Log-normal, median 200, cut off at half the budget."""
    dice = random.Random(0)
    return [max(8, min(2048, int(dice.lognormvariate(5.3, 0.8)))) for _ in range(8000)]


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("units", [64, 512])
@pytest.mark.parametrize("source", [gsm8k, gsm8k_pairs, long_tailed])
def test_real_lengths_fill_bins_and_balance_ranks(source, units: int, ranks: int):
    """Full: at least 97 % of what the fewest bins that could hold the tokens, equally many a rank, would be."""
    dice = random.Random(1)
    lengths_by_step = [dice.sample(source(), units) for _ in range(4)]
    bins = fewest = 0
    for lengths in lengths_by_step:
        plan = plan_bins(lengths, BUDGET, ranks)
        loads = [[sum(lengths[unit] for unit in one) for one in rank] for rank in plan]
        bins += ranks * len(plan[0])
        fewest += ranks * -(-sum(lengths) // (BUDGET * ranks))
        assert max(map(sum, loads)) <= 1.03 * sum(lengths) / ranks
    assert fewest >= 0.97 * bins


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("source", [gsm8k, gsm8k_pairs, long_tailed])
def test_bins_can_be_filled_to_the_brim(source, ranks: int):
    """With a budget that the tokens all but exhaust, the last bin counted too: 97 % full on every number of ranks."""
    lengths = random.Random(2).sample(source(), UNITS)
    budget = int(sum(lengths) / (16 * 0.985))
    plan = plan_bins(lengths, budget, ranks)
    assert sum(lengths) >= 0.97 * budget * ranks * len(plan[0])
