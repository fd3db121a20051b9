"""Which examples a run trains and evaluates on: `data.train` and `data.eval` taken together."""

from collections.abc import Mapping, Sequence
from typing import Any

from msgspec.structs import replace

from megatron_async_rlhf.config.data import DataSection
from megatron_async_rlhf.data.builtin_task import make_examples
from megatron_async_rlhf.data.columns import example_columns
from megatron_async_rlhf.data.example import Example
from megatron_async_rlhf.data.files import find_local, is_local, open_local
from megatron_async_rlhf.data.record import example_of
from megatron_async_rlhf.data.report import DataReport, keep_good
from megatron_async_rlhf.data.rows import Table
from megatron_async_rlhf.data.splits import BUILTIN, Split, split_of
from megatron_async_rlhf.types import Message

_BUILTIN_TRAIN_PROMPTS = 4096


def load_examples(data: DataSection, split: Split, seed: int, report: DataReport | None = None) -> list[Example]:
    """The examples of one split, in the order of their source; no text is in both splits.

    Args:
        report: takes in what was recognised, and what became of every record.

    Raises:
        DataError: a source that is missing, broken or too small.
    """

    def read(part: Split, report: DataReport) -> list[Example]:
        if source_of(data, part) == BUILTIN:
            count = data.eval_prompts if part == "eval" else data.train_prompts or _BUILTIN_TRAIN_PROMPTS
            examples = make_examples(seed, count, part)
            report.read, report.used = report.read + count, report.used + count
        else:
            examples = _read(data, open_table(data, part), report)
        return [replace(example, messages=completed(example.messages, data)) for example in examples]

    return split_of(data, split, seed, read, report if report is not None else DataReport())


def source_of(data: DataSection, split: Split) -> str:
    """Where the split's examples or pairs are read, as the configuration has it."""
    return data.train if split == "train" or data.eval is None else data.eval


def open_table(data: DataSection, split: Split) -> Table:
    """The rows of the split's own source, which is not the built-in task.

    Raises:
        DataError: it is missing, or nobody can read its form.
    """
    value, key = source_of(data, split), "data.train" if data.eval is None else f"data.{split}"
    if not is_local(value):
        from megatron_async_rlhf.data.hub import hub_table

        return hub_table(value, f"{key} = {value}")
    path = find_local(value, key, beside=data.train if split == "eval" and data.eval is not None else None)
    return open_local(path, key, f"{key} = {value}")


def completed(messages: Sequence[Message], data: DataSection) -> list[Message]:
    """A conversation with what the configuration adds to every one."""
    messages = list(messages)
    if data.instruction is not None:
        # After it there may be what a tool has said.
        place = max((at for at, message in enumerate(messages) if message.role == "user"), default=len(messages) - 1)
        asked = messages[place]
        messages[place] = Message(asked.role, f"{asked.content}\n\n{data.instruction}")
    if data.system_prompt is not None and messages[0].role != "system":
        messages.insert(0, Message("system", data.system_prompt))
    return messages


def _read(data: DataSection, table: Table, report: DataReport) -> list[Example]:
    columns = example_columns(table, data)
    if (said := columns.said(data)) is not None:
        report.note(f"{table.source}: {said}")
    names = [*columns.prompt.names, *([columns.solution] if columns.solution else []), *data.reference_fields]

    def make(record: Mapping[str, Any], where: str) -> Example:
        return example_of(record, where, columns, data.reference_fields)

    rows = table.rows(list(dict.fromkeys(names)))
    return keep_good(rows, make, source=table.source, bad_records=data.bad_records, report=report)
