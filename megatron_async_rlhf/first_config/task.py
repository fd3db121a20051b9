"""What a model and its data show of themselves, which a first configuration is made from."""

import keyword
import re
import tempfile
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from msgspec import Struct

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.data.columns import example_columns
from megatron_async_rlhf.data.example import Example
from megatron_async_rlhf.data.record import example_of
from megatron_async_rlhf.data.source import open_table
from megatron_async_rlhf.errors import DataError, RecordError
from megatron_async_rlhf.jobs.inputs import make_model_template, read_tokenizer
from megatron_async_rlhf.models.architecture import Architecture, policy_architecture
from megatron_async_rlhf.rewards.gsm8k import find_answer

_LOOKED_AT = 2000  # records
_BOXED = re.compile(r"\\boxed\{")
_FORMS: dict[str, Callable[[str], object]] = {"number": find_answer, "boxed": _BOXED.search}


class Task(Struct, frozen=True, kw_only=True):
    """
    Attributes:
        prompts: tokens of each prompt with the chat template, sorted.
        solutions: tokens of each solution, sorted; empty if there are none.
        said: where prompts and solutions were found; None if that goes without saying.
        others: further columns, which a reward of one's own could be given.
        answers: how the solutions end: `number` behind `####`, `boxed`, or None if some do not.
        bad: records that cannot be used, and `looked_at` is the number of all that were read.
    """

    architecture: Architecture
    prompts: list[int]
    solutions: list[int]
    said: str | None
    others: list[str]
    answers: str | None
    bad: int
    looked_at: int


def read_task(config: RunConfig) -> Task:
    """Of the first records of `data.train`.

    Args:
        config: with `model.hf`, a directory, and `data`.

    Raises:
        ConfigError, DataError: one line.
    """
    with tempfile.TemporaryDirectory() as scratch:
        template = Path(scratch)
        make_model_template(config, template, or_described=True)
        architecture = policy_architecture(config.model, template)
        tokenizer = read_tokenizer(config, template)
    table = open_table(config.data, "train")
    columns = example_columns(table, config.data)
    records = [row.record for row in islice(table.rows(None), _LOOKED_AT)]
    examples, first = _examples(records, lambda record: example_of(record, table.source, columns, []))
    if not examples:
        raise DataError(f"{table.source}: {first or 'has no records; give a source with at least one'}")
    solutions = [example.solution for example in examples if example.solution]
    claimed = {*columns.prompt.names, columns.solution}
    rows = [record for record in records if isinstance(record, Mapping)]
    names = [name for name in rows[0] if all(name in row for row in rows)]  # what some lack no reward can count on
    return Task(
        architecture=architecture,
        prompts=sorted(len(tokenizer.render_prompt(example.messages)) for example in examples),
        solutions=sorted(len(tokenizer.encode(solution)) + 1 for solution in solutions),  # and its end
        said=columns.said(config.data),
        others=[name for name in names if name not in claimed and _can_be_given(name)],
        answers=_answers(solutions),
        bad=len(records) - len(examples),
        looked_at=len(records),
    )


def _can_be_given(column: str) -> bool:
    """Whether a reward function can have a parameter of that name, beside those that it has in any case."""
    is_taken = column in ("prompt", "completions", "solution") or keyword.iskeyword(column)
    return column.isidentifier() and not is_taken


def _examples(records: list[Any], make: Any) -> tuple[list[Example], RecordError | None]:
    """Those that are good, and what is wrong with the first that is not."""
    good: list[Example] = []
    first: RecordError | None = None
    for record in records:
        try:
            if isinstance(record, RecordError):
                raise record
            good.append(make(record))
        except RecordError as error:
            first = first or error
    return good, first


def _answers(solutions: list[str]) -> str | None:
    for name, find in _FORMS.items():
        if solutions and all(find(solution) is not None for solution in solutions):
            return name
    return None
