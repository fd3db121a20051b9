"""One record of a user's data, checked field by field."""

from collections.abc import Mapping
from typing import Any

import msgspec

from megatron_async_rlhf.data.columns import CHOSEN, ExampleColumns, PromptColumns, without_spelled_end
from megatron_async_rlhf.data.conversation import WRONG_TYPE, read_conversation, split_answer, valid_text
from megatron_async_rlhf.data.example import Example
from megatron_async_rlhf.data.transcript import is_transcript, read_transcript
from megatron_async_rlhf.errors import RecordError
from megatron_async_rlhf.json_lines import json_type
from megatron_async_rlhf.suggestions import closest
from megatron_async_rlhf.types import Message

NO_FIELD = "a missing field"


def example_of(record: Mapping[str, Any], where: str, columns: ExampleColumns, reference_fields: list[str]) -> Example:
    """The example in a record; `where` (file and line) begins every error message.

    Raises:
        RecordError: a field is missing, the prompt is neither text nor messages, the solution is not text, or there is
            nothing to answer.
    """
    messages, answer = prompt_of(record, where, columns.prompt)
    reference = {name: _plain(record, where, name) for name in reference_fields}
    if columns.solution is not None:
        answer = _solution(record, where, columns.solution)
    if answer is not None and not answer.strip():
        answer = None  # a blank cell is no answer
    if answer is not None:
        reference |= {"solution": answer}
    return Example(messages=messages, reference=reference, solution=answer, origin=where)


def prompt_of(record: Mapping[str, Any], where: str, columns: PromptColumns) -> tuple[list[Message], str | None]:
    """The messages of the prompt, and the assistant's answer to them if the conversation continues to it.

    Raises:
        RecordError: there is nothing to answer.
    """
    place = f"{where}: field {columns.prompt!r}"
    value = value_of(record, where, "data.prompt_field", columns.prompt)
    if columns.recognised and columns.prompt == CHOSEN and isinstance(value, str) and is_transcript(value):
        messages = read_transcript(valid_text(value, place))
    else:
        messages = read_conversation(value, place)
    prompt, answer = split_answer(messages, place)
    if columns.further is not None and (further := _optional_text(record, where, columns.further)):
        last = prompt.pop()
        prompt.append(Message(last.role, f"{last.content}\n\n{further}"))
    return with_system(prompt, record, where, columns.system), answer


def with_system(messages: list[Message], record: Mapping[str, Any], where: str, column: str | None) -> list[Message]:
    """The conversation with the system message that is in a column, if there is such a column and it has none itself."""
    if column is None or messages[0].role == "system":
        return messages
    system = _optional_text(record, where, column)
    return [Message("system", system), *messages] if system else messages


def value_of(record: Mapping[str, Any], where: str, key: str, field: str) -> Any:
    """
    Raises:
        RecordError: there is no such field; `key` of the configuration names another.
    """
    if field not in record:
        present = ", ".join(map(repr, record)) or "none"
        meant = closest(field, record)
        advice = f"set {key}" if meant is None else f"did you mean {key} = {meant}?"
        raise RecordError(f"{where}: no field {field!r}, the fields present are {present}; {advice}", reason=NO_FIELD)
    return record[field]


def _plain(record: Mapping[str, Any], where: str, field: str) -> Any:
    value = value_of(record, where, "data.reference_fields", field)
    try:
        msgspec.msgpack.encode(value)
    except (TypeError, UnicodeEncodeError, OverflowError) as error:
        raise RecordError(
            f"{where}: field {field!r} of data.reference_fields is neither text nor numbers, lists or mappings of them: {error}",
            reason=WRONG_TYPE,
        ) from None
    return value


def _solution(record: Mapping[str, Any], where: str, field: str) -> str:
    """A text, or a list with one message of the assistant."""
    value = value_of(record, where, "data.solution_field", field)
    place = f"{where}: field {field!r}"
    if isinstance(value, list) and value:
        last = read_conversation(value, place)[-1]
        if last.role == "assistant":
            return last.content
    if not isinstance(value, str):
        raise RecordError(
            f"{place} is {json_type(value)}, not text; make it a string, or set data.solution_field", reason=WRONG_TYPE
        )
    return without_spelled_end(valid_text(value, place), field)


def _optional_text(record: Mapping[str, Any], where: str, field: str) -> str:
    """Empty where there is none."""
    value = record.get(field)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RecordError(f"{where}: field {field!r} is {json_type(value)}, not text", reason=WRONG_TYPE)
    return valid_text(value, f"{where}: field {field!r}") if value.strip() else ""
