"""One record of a user's data, checked field by field."""

from collections.abc import Mapping
from typing import Any

import msgspec

from megatron_async_rlhf.config.sections import DataSection
from megatron_async_rlhf.data.conversation import read_conversation, split_answer, valid_text
from megatron_async_rlhf.data.example import Example
from megatron_async_rlhf.errors import DataError
from megatron_async_rlhf.json_lines import json_type
from megatron_async_rlhf.suggestions import closest
from megatron_async_rlhf.types import Message


def fields_of(data: DataSection) -> list[str]:
    """The fields of a record that are read, without repetition."""
    solution = [] if data.solution_field is None else [data.solution_field]
    return list(dict.fromkeys([data.prompt_field, *solution, *data.reference_fields]))


def example_of(record: Mapping[str, Any], where: str, data: DataSection) -> Example:
    """The example in a record; `where` (file and line) begins every error message.

    Raises:
        DataError: a field is missing, the prompt is neither text nor messages, the solution is not text, or there is
            nothing to answer.
    """
    messages, answer = _conversation(record, where, data)
    reference = {name: _plain(record, where, name) for name in data.reference_fields}
    if data.solution_field is not None:
        answer = _text(record, where, "data.solution_field", data.solution_field)
    if answer is not None:
        reference |= {"solution": answer}
    return Example(messages=messages, reference=reference, solution=answer, origin=where)


def _conversation(record: Mapping[str, Any], where: str, data: DataSection) -> tuple[list[Message], str | None]:
    """The messages of the prompt, and the assistant's answer to them if the conversation goes on to it."""
    place = f"{where}: field {data.prompt_field!r}"
    value = _value(record, where, "data.prompt_field", data.prompt_field)
    return split_answer(read_conversation(value, place), place)


def _value(record: Mapping[str, Any], where: str, key: str, field: str) -> Any:
    if field not in record:
        present = ", ".join(map(repr, record)) or "none"
        meant = closest(field, record)
        advice = f"set {key}" if meant is None else f"did you mean {key} = {meant}?"
        raise DataError(f"{where}: no field {field!r}, the fields present are {present}; {advice}")
    return record[field]


def _plain(record: Mapping[str, Any], where: str, field: str) -> Any:
    value = _value(record, where, "data.reference_fields", field)
    try:
        msgspec.msgpack.encode(value)
    except (TypeError, UnicodeEncodeError, OverflowError) as error:
        raise DataError(
            f"{where}: field {field!r} of data.reference_fields is neither text nor numbers, lists or mappings of them: {error}"
        ) from None
    return value


def _text(record: Mapping[str, Any], where: str, key: str, field: str) -> str:
    value = _value(record, where, key, field)
    if not isinstance(value, str):
        raise DataError(f"{where}: field {field!r} is {json_type(value)}, not text; make it a string, or set {key}")
    return valid_text(value, f"{where}: field {field!r}")
