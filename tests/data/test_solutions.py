"""Answers as rows of supervised training, and what is said where there are none."""

import shutil
from pathlib import Path

import pytest

from megatron_async_rlhf.data.conversation import one_turn
from megatron_async_rlhf.data.example import Example
from megatron_async_rlhf.data.prompts import build_prompts
from megatron_async_rlhf.data.solutions import answered_row, answered_rows, solved_prompts
from megatron_async_rlhf.data.tokenizer import Tokenizer
from megatron_async_rlhf.errors import DataError
from megatron_async_rlhf.types import Message


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


def conversation(*contents: str) -> list[Message]:
    return [Message(("user", "assistant")[place % 2], content) for place, content in enumerate(contents)]


def targets(row) -> bytes:
    """The bytes that the loss is of; `.` for the end-of-sequence token."""
    ignored = {place for first, end in row.ignored for place in range(first, end)}
    places = [place for place in range(row.prompt_length, len(row.token_ids)) if place not in ignored]
    assert len(places) == row.num_targets
    return bytes(row.token_ids[place] if row.token_ids[place] < 256 else ord(".") for place in places)


def test_the_loss_is_of_the_last_answer_or_of_all(tokenizer: Tokenizer):
    asked = conversation("ab", "cd", "ef", "", "gh")
    last, every = (answered_row(asked, "ij", tokenizer, answers) for answers in ("last", "all"))
    assert last.token_ids == every.token_ids
    assert targets(last) == b"ij." and last.ignored == []
    assert targets(every) == b"cd..ij."


def test_earlier_answers_that_a_template_rewrites_are_refused(byte_directory, tmp_path):
    directory = Path(shutil.copytree(byte_directory, tmp_path / "copy"))
    template = directory / "chat_template.jinja"
    template.write_text(template.read_text().replace("message['content']", "message['content'].split('|')[-1]"))
    tokenizer = Tokenizer.load(directory)
    asked = conversation("ab", "thought|cd", "ef")
    assert targets(answered_row(asked, "ij", tokenizer, "all")) == b"cd.ij."  # it is what the model reads that counts
    template.write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>")
    tokenizer = Tokenizer.load(directory)
    with pytest.raises(DataError, match="turn 2 as it was asked for and ended.*set sft.answers = last"):
        answered_row(asked, "ij", tokenizer, "all")
    assert targets(answered_row(asked, "ij", tokenizer)) == b"ij."  # the answer's own end, without the template's help


def examples(*solutions: str | None) -> list[Example]:
    return [
        Example(messages=one_turn("ab"), reference={}, solution=solution, origin=f"x.jsonl:{line}")
        for line, solution in enumerate(solutions, start=1)
    ]


def test_what_is_left_out_is_counted(tokenizer: Tokenizer):
    rows = answered_rows(examples("x", None, "too long", "yy"), tokenizer, 8, answers="last", drop_long=True)
    assert [targets(row) for row in rows.rows] == [b"x.", b"yy."]
    assert (rows.unanswered, rows.too_long) == (1, 1)


@pytest.mark.parametrize(
    ("solutions", "drop_long", "message"),
    [
        (("x", "long one", "longer one"), False, r"x.jsonl:2 .* has 13 tokens with its answer, above the limit of 8, the first of 2 .* drop"),
        (("longer one", "long one"), True, r"x.jsonl:2 .*the shortest of 2 such conversations, which are all; raise sft.max_tokens or model.context_length$"),
        ((None, None), True, "none of the 2 conversations has an answer to train on; set data.solution_field"),
    ],
)  # fmt: skip
def test_the_first_that_does_not_fit_is_named(tokenizer: Tokenizer, solutions, drop_long, message):
    with pytest.raises(DataError, match=message):
        answered_rows(examples(*solutions), tokenizer, 8, answers="last", drop_long=drop_long)


def test_what_the_assistant_says_first_is_part_of_the_prompt(tokenizer: Tokenizer):
    messages = [Message("assistant", "hi"), *conversation("ab", "cd", "ef")]
    assert targets(answered_row(messages, "ij", tokenizer, "all")) == b"cd.ij."


def test_conversations_of_which_the_template_makes_no_row_are_refused_or_left_out(byte_directory, tmp_path):
    directory = Path(shutil.copytree(byte_directory, tmp_path / "copy"))
    template = directory / "chat_template.jinja"
    spoilt = "{{ raise_exception('no odd ones') if messages[0]['content'] == 'odd' }}"
    template.write_text(spoilt + template.read_text())
    tokenizer = Tokenizer.load(directory)
    odd = Example(messages=one_turn("odd"), reference={}, solution="x", origin="x.jsonl:1")
    with pytest.raises(DataError, match="no odd ones"):
        answered_rows([odd, *examples("x")], tokenizer, 20, answers="all", drop_long=False)
    rows = answered_rows([odd, *examples("x")], tokenizer, 20, answers="all", drop_long=False, drop_unclear=True)
    assert [targets(row) for row in rows.rows] == [b"x."] and rows.unclear == 1
    with pytest.raises(DataError, match="no odd ones"):
        answered_rows([odd], tokenizer, 20, answers="all", drop_long=False, drop_unclear=True)
