"""Examples from a dataset of the Hugging Face hub, or a local one in a form the `datasets` library reads."""

import re
from pathlib import Path
from typing import Any

from megatron_async_rlhf.config.sections import DataSection
from megatron_async_rlhf.data.example import Example
from megatron_async_rlhf.data.record import example_of, fields_of
from megatron_async_rlhf.errors import DataError

_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


def read_hub(source: str, key: str, data: DataSection) -> list[Example]:
    """All examples of `hf:<dataset>[:<config>]:<split>`; the dataset may be a local directory or file.

    Raises:
        DataError: malformed source, the library cannot load it, no rows, or a row is wrong.
    """
    # A colon inside brackets belongs to the split (`train[:100]`).
    fields = re.split(r":(?![^\[]*\])", source.removeprefix("hf:"))
    if len(fields) not in (2, 3) or not all(fields):
        raise DataError(
            f"{key} = {source}: the form is hf:<dataset>[:<config>]:<split>, e.g. hf:openai/gsm8k:main:train"
        )
    dataset = _load(source, key, fields[0], fields[1] if len(fields) == 3 else None, fields[-1])
    wanted = fields_of(data)
    # Without a wanted column the first row is read whole, for the message to name what there is.
    rows = dataset.select_columns(wanted) if set(wanted) <= set(dataset.column_names) else dataset
    examples = [example_of(row, f"{source} row {number}", data) for number, row in enumerate(rows)]
    if not examples:
        raise DataError(f"{key} = {source}: has no prompts; give a split with at least one row")
    return examples


def _load(source: str, key: str, name: str, config: str | None, split: str) -> Any:
    try:
        import datasets  # here, because it is slow to import and most runs do without

        builder = _BUILDERS.get(Path(name).suffix)
        if builder is not None and not Path(name).exists():
            raise FileNotFoundError(f"no such file: {Path(name).absolute()}")
        if builder is not None and Path(name).is_file():
            return datasets.load_dataset(builder, config, data_files={split.partition("[")[0]: name}, split=split)
        return datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the library and what is below it raise dozens of types
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
        raise DataError(
            f"{key} = {source}: datasets cannot load it ({type(error).__name__}: {reason}); check name, config, split"
            " and network"
        ) from None
