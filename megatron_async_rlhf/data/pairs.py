"""Preference pairs: two answers to one conversation, of which one is better."""

import math
from collections.abc import Mapping
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from megatron_async_rlhf.config.data import DataSection
from megatron_async_rlhf.data.columns import PairColumns, pair_columns, without_spelled_end
from megatron_async_rlhf.data.conversation import (
    NOTHING_TO_ANSWER,
    WRONG_TYPE,
    read_conversation,
    split_answer,
    valid_text,
)
from megatron_async_rlhf.data.record import prompt_of, value_of, with_system
from megatron_async_rlhf.data.report import DataReport, keep_good
from megatron_async_rlhf.data.source import completed, open_table, source_of
from megatron_async_rlhf.data.splits import BUILTIN, Split, split_of
from megatron_async_rlhf.data.transcript import is_transcript, read_transcript, split_transcripts
from megatron_async_rlhf.errors import DataError, RecordError
from megatron_async_rlhf.json_lines import json_type
from megatron_async_rlhf.types import Message

IDENTICAL, EMPTY_SIDE = "identical sides", "an empty side"
DIFFERENT_PROMPTS, NO_PROMPT, NO_ANSWER = "different prompts", "no prompt", "no answer of the assistant"


class PreferencePair(Struct, frozen=True, kw_only=True):
    """One conversation that the assistant is to answer, with a better and a worse answer.

    Attributes:
        messages: the conversation; it ends with the message to answer.
        margin: how much better the chosen one is, in the data's own unit; None if the data does not say.
        origin: file and line, or dataset and row, for messages.
    """

    messages: list[Message]
    chosen: str
    rejected: str
    margin: float | None
    origin: str


def load_pairs(data: DataSection, split: Split, seed: int, report: DataReport | None = None) -> list[PreferencePair]:
    """The pairs of one split, in the order of their source; no prompt is in both splits.

    Args:
        report: takes in what was recognised, and what became of every record.

    Raises:
        DataError: a source that is missing, broken or too small, or has no pairs.
    """

    def read(part: Split, report: DataReport) -> list[PreferencePair]:
        if source_of(data, part) == BUILTIN:
            raise DataError(
                f"data.{part} = builtin: the built-in task has no preference pairs; give a source with a chosen and a "
                "rejected answer"
            )
        table = open_table(data, part)
        columns = pair_columns(table, data)
        if (said := columns.said(data)) is not None:
            report.note(f"{table.source}: {said}")

        def make(record: Mapping[str, Any], where: str) -> PreferencePair:
            return pair_of(record, where, columns, data)

        rows = table.rows(columns.names)
        return keep_good(rows, make, source=table.source, bad_records=data.bad_records, report=report)

    return split_of(data, split, seed, read, report if report is not None else DataReport())


def pair_of(record: Mapping[str, Any], where: str, columns: PairColumns, data: DataSection) -> PreferencePair:
    """The pair in a record; `where` (file and line) begins every error message.

    Raises:
        RecordError: a side is missing, empty or the same as the other one, or they answer different prompts.
    """
    columns = _in_order(record, where, columns)
    chosen = value_of(record, where, "data.chosen_field", columns.chosen)
    rejected = value_of(record, where, "data.rejected_field", columns.rejected)
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise RecordError(
            f"{where}: field {columns.chosen!r} is {json_type(chosen)}, field {columns.rejected!r} {json_type(rejected)}; "
            "make both texts, or both lists of messages",
            reason=WRONG_TYPE,
        )
    own_prompt = None
    if columns.prompt is not None:
        own_prompt = _unanswered(*prompt_of(record, where, columns.prompt), f"{where}: field {columns.prompt.prompt!r}")
    if isinstance(chosen, str):
        shared, better, worse = _of_texts(chosen, rejected, where, columns, has_prompt=own_prompt is not None)
    else:
        shared, better, worse = _of_conversations(chosen, rejected, where, columns)
    messages = own_prompt or shared
    if not messages:
        raise RecordError(
            f"{where}: there is no prompt, neither in {columns.chosen!r} and {columns.rejected!r} nor in a column; set "
            "data.prompt_field",
            reason=NO_PROMPT,
        )
    messages = with_system(messages, record, where, columns.system)
    for name, side in ((columns.chosen, better), (columns.rejected, worse)):
        if not side.strip():
            raise RecordError(f"{where}: the answer in field {name!r} is empty; remove the record", reason=EMPTY_SIDE)
    if better.strip() == worse.strip():
        raise RecordError(
            f"{where}: {columns.chosen!r} and {columns.rejected!r} are the same; remove the record", reason=IDENTICAL
        )
    margin = _margin(record, where, columns)
    return PreferencePair(
        messages=completed(messages, data), chosen=better, rejected=worse, margin=margin, origin=where
    )


def _in_order(record: Mapping[str, Any], where: str, columns: PairColumns) -> PairColumns:
    """The columns of this record's better and worse answer."""
    if columns.choice is None:
        return columns
    choice = value_of(record, where, "data.chosen_field", columns.choice)
    if choice in ("0", "1"):  # of a CSV file it is text
        choice = int(choice)
    if choice not in (0, 1):
        raise RecordError(f"{where}: field {columns.choice!r} is neither 0 nor 1", reason=WRONG_TYPE)
    return replace(columns, chosen=columns.rejected, rejected=columns.chosen) if choice else columns


def _of_texts(
    chosen: str, rejected: str, where: str, columns: PairColumns, *, has_prompt: bool
) -> tuple[list[Message], str, str]:
    """The conversation that two transcripts share, and the answers; or texts that are answers and nothing else."""
    for name, side in ((columns.chosen, chosen), (columns.rejected, rejected)):
        valid_text(side, f"{where}: field {name!r}")
    if has_prompt or not (is_transcript(chosen) and is_transcript(rejected)):
        return [], without_spelled_end(chosen, columns.chosen), without_spelled_end(rejected, columns.rejected)
    if chosen == rejected:
        raise RecordError(
            f"{where}: {columns.chosen!r} and {columns.rejected!r} are the same; remove the record", reason=IDENTICAL
        )
    shared, better, worse = split_transcripts(chosen, rejected)
    turns = read_transcript(shared)[:-1] if shared else []
    for name, side in ((columns.chosen, better), (columns.rejected, worse)):
        if not shared or "\n\nHuman:" in side:
            raise RecordError(
                f"{where}: {columns.chosen!r} and {columns.rejected!r} differ before their last answer (seen in {name!r}); "
                "remove the record",
                reason=DIFFERENT_PROMPTS,
            )
    place = f"{where}: field {columns.chosen!r}"
    return _unanswered(*split_answer(turns, place), place), better.strip(), worse.strip()


def _of_conversations(chosen: Any, rejected: Any, where: str, columns: PairColumns) -> tuple[list[Message], str, str]:
    """The conversation that both lists of messages begin with, and the answers with which they end."""
    prompts, answers = [], []
    for name, value in ((columns.chosen, chosen), (columns.rejected, rejected)):
        place = f"{where}: field {name!r}"
        messages = read_conversation(value, place)
        if not messages or messages[-1].role != "assistant":
            raise RecordError(f"{place} does not end with an answer of the assistant", reason=NO_ANSWER)
        prompts.append(messages[:-1])
        answers.append(messages[-1].content)
    if prompts[0] != prompts[1]:
        raise RecordError(
            f"{where}: {columns.chosen!r} and {columns.rejected!r} answer different prompts; remove the record",
            reason=DIFFERENT_PROMPTS,
        )
    place = f"{where}: field {columns.chosen!r}"
    prompt = _unanswered(*split_answer(prompts[0], place), place) if prompts[0] else []
    return prompt, answers[0], answers[1]


def _unanswered(prompt: list[Message], answer: str | None, place: str) -> list[Message]:
    """The prompt of a pair, which the sides answer and nothing else does."""
    if answer is not None:
        raise RecordError(
            f"{place}: the prompt ends with an answer of the assistant, before those of the sides; remove the record",
            reason=NOTHING_TO_ANSWER,
        )
    return prompt


def _margin(record: Mapping[str, Any], where: str, columns: PairColumns) -> float | None:
    numbers = []
    for name in columns.margin:
        value = value_of(record, where, "data.margin_field", name)
        if value is None or value == "":  # as CSV writes nothing
            return None
        try:
            number = math.nan if isinstance(value, bool) else float(value)  # of a CSV file it is text
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise RecordError(f"{where}: field {name!r} is {json_type(value)}, not a finite number", reason=WRONG_TYPE)
        numbers.append(number)
    return None if not numbers else numbers[0] - sum(numbers[1:])
