"""One record of a user's data, checked field by field."""

from collections.abc import Mapping
from typing import Any

from megatron_async_rlhf.data.example import Example
from megatron_async_rlhf.errors import DataError
from megatron_async_rlhf.json_lines import json_type
from megatron_async_rlhf.suggestions import closest


def example_of(record: Mapping[str, Any], where: str, prompt_field: str, solution_field: str | None) -> Example:
    """The example in a record; `where` (file and line) begins every error message.

    Raises:
        DataError: a field is missing or is not text, or the prompt is empty.
    """
    text = _text(record, where, "data.prompt_field", prompt_field)
    if not text.strip():
        raise DataError(f"{where}: the prompt in field {prompt_field!r} is empty; remove the record or fill it in")
    if solution_field is None:
        return Example(text=text, reference={}, origin=where)
    solution = _text(record, where, "data.solution_field", solution_field)
    return Example(text=text, reference={"solution": solution}, solution=solution, origin=where)


def _text(record: Mapping[str, Any], where: str, key: str, field: str) -> str:
    if field not in record:
        present = ", ".join(map(repr, record)) or "none"
        meant = closest(field, record)
        advice = f"set {key}" if meant is None else f"did you mean {key} = {meant}?"
        raise DataError(f"{where}: no field {field!r}, the fields present are {present}; {advice}")
    value = record[field]
    if not isinstance(value, str):
        raise DataError(f"{where}: field {field!r} is {json_type(value)}, not text; make it a string, or set {key}")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can escape half of a surrogate pair
        raise DataError(f"{where}: field {field!r} is not valid Unicode (a lone surrogate); correct it") from None
    return value
