"""Answered conversations as training rows of supervised fine-tuning, and of the warm start before RL.

A row is the prompt as RL renders it, the answer, and the token that ends it: what the policy is to sample.
"""

from collections.abc import Sequence as Seq
from typing import Literal

from msgspec import Struct

from megatron_async_rlhf.data.example import Example
from megatron_async_rlhf.data.tokenizer import Tokenizer
from megatron_async_rlhf.errors import DataError
from megatron_async_rlhf.types import Message, Prompt, Sequence

Answers = Literal["last", "all"]


class AnsweredRows(Struct, frozen=True, kw_only=True):
    """What supervised fine-tuning trains on.

    Attributes:
        rows: those that fit, in the order of the data.
        unanswered: how many conversations have no answer.
        too_long: how many do not fit.
        unclear: of how many the chat template makes no row.
    """

    rows: list[Sequence]
    unanswered: int
    too_long: int
    unclear: int = 0


def answered_rows(
    examples: Seq[Example],
    tokenizer: Tokenizer,
    max_tokens: int,
    *,
    answers: Answers,
    drop_long: bool,
    drop_unclear: bool = False,
) -> AnsweredRows:
    """Every conversation with an answer as one row.

    Args:
        max_tokens: of a row.
        answers: whether the loss is of the last turn of the assistant only, or of all its turns.

    Raises:
        DataError: a row is longer and `drop_long` is off, naming the first; no conversation has an answer, or none that
            fits; or the chat template refuses a conversation, or does not show where an earlier answer ends, and
            `drop_unclear` is off or it is so with all of them.
    """
    rows: list[tuple[Example, Sequence]] = []
    too_long: list[tuple[Example, Sequence]] = []
    unanswered = unclear = 0
    refusal: DataError | None = None
    for example in examples:
        if example.solution is None:
            unanswered += 1
            continue
        try:
            row = answered_row(example.messages, example.solution, tokenizer, answers, example.origin)
        except DataError as error:
            if not drop_unclear:
                raise
            unclear, refusal = unclear + 1, refusal or error
            continue
        (rows if len(row.token_ids) <= max_tokens else too_long).append((example, row))
    if unanswered == len(examples):
        raise DataError(
            f"none of the {len(examples)} conversations has an answer to train on; set data.solution_field to the field "
            "with good answers, or data.prompt_field to one with messages that end with the assistant's"
        )
    if refusal is not None and not rows and not too_long:
        raise refusal
    if too_long and not (drop_long and rows):
        example, row = min(too_long, key=lambda pair: len(pair[1].token_ids)) if not rows else too_long[0]
        which = "the first" if rows else "the shortest"
        raise DataError(
            f"{example.name} has {len(row.token_ids)} tokens with its answer, above the limit of {max_tokens}, {which} of "
            f"{len(too_long)} such conversations{'' if rows else ', which are all'}; raise sft.max_tokens or "
            f"model.context_length{', or set data.long_prompts = drop' if rows else ''}"
        )
    return AnsweredRows(rows=[row for _, row in rows], unanswered=unanswered, too_long=len(too_long), unclear=unclear)


def answered_row(
    messages: Seq[Message],
    answer: str,
    tokenizer: Tokenizer,
    answers: Answers = "last",
    origin: str = "",
    *,
    rendered: list[int] | None = None,
) -> Sequence:
    """One conversation and its answer.

    Args:
        rendered: the prompt's tokens, if they are known.

    Raises:
        DataError: see `answered_rows`.
    """
    asked = tokenizer.render_prompt(messages) if rendered is None else rendered
    token_ids = tokenizer.render_answered([*messages, Message("assistant", answer)], asked)
    roles = [message.role for message in messages]
    begins, ends = [], []
    for place in range(len(roles)) if answers == "all" else ():
        if roles[place] != "assistant" or "user" not in roles[:place]:  # what it says unasked is part of the prompt
            continue
        prompt, after = tokenizer.render_prompt(messages[:place]), tokenizer.render_prompt(messages[: place + 2])
        begin = len(prompt)
        end = begin + token_ids[begin:].index(tokenizer.eos_token_id) + 1
        if token_ids[:begin] != prompt or end > len(after):
            raise DataError(
                f"{origin or 'a conversation'}: the chat template does not leave the assistant's turn {place + 1} as it was "
                "asked for and ended, once more turns follow; set sft.answers = last"
            )
        begins.append(begin)
        ends.append(end)
    begins.append(len(asked))
    between = [(end, begin) for end, begin in zip(ends, begins[1:], strict=True) if begin > end]
    return Sequence(token_ids=token_ids, prompt_length=begins[0], ignored=between)


def solved_prompts(prompts: Seq[Prompt], tokenizer: Tokenizer, context_length: int) -> dict[int, Sequence]:
    """Prompt, solution and end-of-sequence token as one row, by prompt index; too long ones are left out.

    Raises:
        DataError: not one prompt has a solution, or none that fits the context.
    """
    rows = {
        prompt.index: answered_row(prompt.messages, prompt.solution, tokenizer, rendered=prompt.token_ids)
        for prompt in prompts
        if prompt.solution is not None
    }
    if not rows:
        raise DataError(
            f"the warm start trains on solutions, and none of the {len(prompts)} training prompts has one; set "
            "data.solution_field to the field with good answers, or warm_start.steps = 0"
        )
    solved = {index: row for index, row in rows.items() if len(row.token_ids) <= context_length}
    if not solved:
        shortest = min(len(row.token_ids) for row in rows.values())
        raise DataError(
            f"with its solution none of the {len(prompts)} training prompts fits the context of {context_length} tokens, "
            f"the shortest has {shortest}; raise model.context_length, or set warm_start.steps = 0"
        )
    return solved
