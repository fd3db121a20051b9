from collections import Counter

import pytest

from megatron_async_rlhf.data.conversation import one_turn
from megatron_async_rlhf.data.example import Example
from megatron_async_rlhf.data.prompts import PromptOrder, build_prompts
from megatron_async_rlhf.data.tokenizer import Tokenizer
from megatron_async_rlhf.errors import DataError
from megatron_async_rlhf.types import Prompt


def prompts(count: int) -> list[Prompt]:
    return [Prompt(index=index, text=str(index), token_ids=[index], reference={}) for index in range(count)]


def drawn(order: PromptOrder, steps: range, size: int) -> list[int]:
    return [prompt.index for step in steps for prompt in order.batch(step, size)]


def test_prompts_carry_their_example(byte_directory):
    examples = [
        Example(messages=one_turn("ab"), reference={"solution": "x"}, solution="x"),
        Example(messages=one_turn("c"), reference={}),
    ]
    first, second = build_prompts(examples, Tokenizer.load(byte_directory), 4)
    assert first == Prompt(
        index=0,
        text="ab",
        token_ids=[258, 97, 98, 259],
        reference={"solution": "x"},
        solution="x",
        messages=one_turn("ab"),
    )
    assert second == Prompt(
        index=1, text="c", token_ids=[258, 99, 259], reference={}, solution=None, messages=one_turn("c")
    )


def test_first_prompt_that_is_too_long_is_named(byte_directory):
    examples = [Example(messages=one_turn(text), reference={}) for text in ("ab", "abcd", "abcdefgh")]
    message = (
        r"prompt 1 \('abcd'\) has 6 tokens with the chat template, above the limit of 5, the first of 2 such prompts; "
        "raise data.max_prompt"
    )
    with pytest.raises(DataError, match=message):
        build_prompts(examples, Tokenizer.load(byte_directory), 5)


@pytest.mark.parametrize(("count", "size"), [(12, 4), (10, 4), (7, 1), (3, 8), (1, 1)])
def test_each_epoch_has_every_prompt_once(count, size):
    indices = drawn(PromptOrder(prompts(count), seed=3), range(count), size)  # `size` whole epochs
    for epoch in range(size):
        assert Counter(indices[epoch * count : (epoch + 1) * count]) == dict.fromkeys(range(count), 1)


def test_order_depends_on_nothing_but_seed_step_and_size():
    order = PromptOrder(prompts(50), seed=1)
    forward = [order.batch(step, 8) for step in range(30)]
    resumed = PromptOrder(prompts(50), seed=1)
    assert [resumed.batch(step, 8) for step in reversed(range(30))] == forward[::-1]


def test_epochs_and_seeds_differ():
    order = PromptOrder(prompts(50), seed=1)
    orders = [
        drawn(order, range(0, 5), 10),
        drawn(order, range(5, 10), 10),
        drawn(PromptOrder(prompts(50), seed=2), range(0, 5), 10),
        list(range(50)),
    ]
    assert len({tuple(indices) for indices in orders}) == 4


def test_impossible_orders_are_refused():
    with pytest.raises(DataError, match="no prompts to draw from"):
        PromptOrder([], seed=0)
    order = PromptOrder(prompts(3), seed=0)
    for step, size in ((-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=f"no batch of {size} prompts at step {step}"):
            order.batch(step, size)
