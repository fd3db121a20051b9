"""Rows of a dataset of the Hugging Face hub, or of a local one named in the same form."""

import re
from functools import cache
from pathlib import Path
from typing import Any

from megatron_async_rlhf.data.library import is_saved, loaded, rows_of
from megatron_async_rlhf.data.rows import Table
from megatron_async_rlhf.errors import DataError, UnreachableError
from megatron_async_rlhf.hub import hub_problem, is_unreachable

_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


def hub_table(value: str, source: str) -> Table:
    """The rows of `hf:<dataset>[:<config>]:<split>`, counted from 0; the dataset may be a local directory or file.

    Args:
        source: key and value, for messages.

    Raises:
        DataError: malformed, or the library cannot load it; an `UnreachableError` if the hub cannot be asked.
    """
    # A colon inside brackets belongs to the split (`train[:100]`).
    fields = re.split(r":(?![^\[]*\])", value.removeprefix("hf:"))
    if len(fields) not in (2, 3) or not all(fields):
        raise DataError(f"{source}: the form is hf:<dataset>[:<config>]:<split>, e.g. hf:openai/gsm8k:main:train")
    name, config, split = fields[0], fields[1] if len(fields) == 3 else None, fields[-1]

    def load() -> Any:
        try:
            return _load(name, config, split)
        except Exception as error:  # the library and what is below it raise dozens of types
            if (problem := hub_problem(error, "dataset", name)) is None:
                raise
            kind = UnreachableError if is_unreachable(error) else DataError
            raise kind(f"{source}: {problem}") from None

    dataset = cache(lambda: loaded(load, source, "check name, config, split and network"))
    return Table(source, lambda columns: rows_of(dataset(), value, columns, source))


def _load(name: str, config: str | None, split: str) -> Any:
    import datasets

    path = Path(name)
    builder = _BUILDERS.get(path.suffix)
    if builder is not None and not path.exists():
        raise FileNotFoundError(f"no such file: {path.absolute()}")
    if builder is not None and path.is_file():
        return datasets.load_dataset(builder, config, data_files={split.partition("[")[0]: name}, split=split)
    if is_saved(path):
        saved = datasets.load_from_disk(name)
        parts = saved if isinstance(saved, dict) else {str(saved.split or "train"): saved}
        if split not in parts:
            raise ValueError(f"no part {split!r}, only {', '.join(map(str, parts))}")
        return parts[split]
    return datasets.load_dataset(name, config, split=split)
