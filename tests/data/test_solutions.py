"""Solutions as rows for the warm start, and what is said where there are none."""

import pytest

from megatron_async_rlhf.data.conversation import one_turn
from megatron_async_rlhf.data.example import Example
from megatron_async_rlhf.data.prompts import build_prompts
from megatron_async_rlhf.data.solutions import solved_prompts
from megatron_async_rlhf.data.tokenizer import Tokenizer
from megatron_async_rlhf.errors import DataError


@pytest.fixture
def tokenizer(byte_directory) -> Tokenizer:
    return Tokenizer.load(byte_directory)


def prompts(tokenizer: Tokenizer, *solutions: str | None) -> list:
    examples = [Example(messages=one_turn("ab"), reference={}, solution=solution) for solution in solutions]
    return build_prompts(examples, tokenizer, 10)


def test_what_fits_becomes_a_row(tokenizer: Tokenizer):
    solved = solved_prompts(prompts(tokenizer, "x", None, "too long for it"), tokenizer, 8)
    assert list(solved) == [0]
    assert solved[0].token_ids == [258, 97, 98, 259, 120, tokenizer.eos_token_id] and solved[0].prompt_length == 4


def test_without_any_solution_the_key_is_named(tokenizer: Tokenizer):
    with pytest.raises(
        DataError, match="none of the 2 training prompts has one; set data.solution_field .* or warm_start"
    ):
        solved_prompts(prompts(tokenizer, None, None), tokenizer, 8)


def test_where_none_fits_it_is_said_what_would(tokenizer: Tokenizer):
    with pytest.raises(DataError, match="fits the context of 8 tokens, the shortest has 9; raise model.context_length"):
        solved_prompts(prompts(tokenizer, "xxxx", "xxxxx", None), tokenizer, 8)
