"""One record of a user's data, checked field by field."""

from collections.abc import Mapping
from typing import Any

import msgspec

from megatron_async_rlhf.config.sections import DataSection
from megatron_async_rlhf.data.example import Example
from megatron_async_rlhf.errors import DataError
from megatron_async_rlhf.json_lines import json_type
from megatron_async_rlhf.suggestions import closest


def fields_of(data: DataSection) -> list[str]:
    """The fields of a record that are read, without repetition."""
    solution = [] if data.solution_field is None else [data.solution_field]
    return list(dict.fromkeys([data.prompt_field, *solution, *data.reference_fields]))


def example_of(record: Mapping[str, Any], where: str, data: DataSection) -> Example:
    """The example in a record; `where` (file and line) begins every error message.

    Raises:
        DataError: a field is missing, the prompt or the solution is not text, or the prompt is empty.
    """
    text = _text(record, where, "data.prompt_field", data.prompt_field)
    if not text.strip():
        raise DataError(f"{where}: the prompt in field {data.prompt_field!r} is empty; remove the record or fill it in")
    reference = {name: _plain(record, where, name) for name in data.reference_fields}
    if data.solution_field is None:
        return Example(text=text, reference=reference, origin=where)
    solution = _text(record, where, "data.solution_field", data.solution_field)
    return Example(text=text, reference=reference | {"solution": solution}, solution=solution, origin=where)


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
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can escape half of a surrogate pair
        raise DataError(f"{where}: field {field!r} is not valid Unicode (a lone surrogate); correct it") from None
    return value
