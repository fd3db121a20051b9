"""Which rows make a step of supervised fine-tuning."""

import random
from collections import Counter
from itertools import chain

import pytest

from megatron_async_rlhf.config.sft import SFTSection
from megatron_async_rlhf.data.batches import plan_batches

LENGTHS = [random.Random(7).randrange(1, 50) for _ in range(23)]


def test_an_epoch_has_every_row_once_and_the_last_step_what_is_left():
    batches = plan_batches(LENGTHS, SFTSection(epochs=2, batch_size=5), seed=3)
    assert [len(batch) for batch in batches] == [5] * 9 + [1]
    rows = list(chain.from_iterable(batches))
    assert Counter(rows[:23]) == Counter(rows[23:]) == Counter(range(23))
    assert rows[:23] != rows[23:] and rows[:23] != sorted(rows[:23])


def test_so_many_steps_go_on_into_the_next_epoch():
    batches = plan_batches(LENGTHS, SFTSection(steps=7, batch_size=5), seed=3)
    assert [len(batch) for batch in batches] == [5] * 7
    assert batches == plan_batches(LENGTHS, SFTSection(epochs=2, batch_size=5), seed=3)[:7]


@pytest.mark.parametrize("amount", [{"epochs": 1}, {"steps": 30}])
def test_a_step_has_as_many_rows_as_fit_its_tokens(amount):
    lengths = [*LENGTHS, 200]  # longer than a step
    batches = plan_batches(lengths, SFTSection(batch_tokens=100, **amount), seed=0)
    tokens = [sum(lengths[row] for row in batch) for batch in batches]
    assert all(total <= 100 or batch == [23] for total, batch in zip(tokens, batches, strict=True))
    following = [lengths[batch[0]] for batch in batches[1:]]
    assert all(total + length > 100 for total, length in zip(tokens, following, strict=False))
    if "epochs" in amount:
        assert sorted(chain.from_iterable(batches)) == list(range(24))
    else:
        assert len(batches) == 30


def test_the_seed_orders_them():
    keys = SFTSection(batch_size=4)
    assert plan_batches(LENGTHS, keys, 1) == plan_batches(LENGTHS, keys, 1) != plan_batches(LENGTHS, keys, 2)
