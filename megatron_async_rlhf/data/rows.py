"""A source of data as rows of columns, whatever form it has on disk or at the hub."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from msgspec import Struct

from megatron_async_rlhf.errors import DataError, RecordError

# How the parts of a dataset are called that are not trained on.
_HELD_OUT = ("test", "validation", "valid", "val", "dev", "eval")


class Row(Struct, frozen=True):
    """One row.

    Attributes:
        where: file and line, file and record, or dataset and row; begins every message about it.
        record: values by column, or why they cannot be read.
    """

    where: str
    record: Mapping[str, Any] | RecordError


class Table(Struct, frozen=True):
    """All rows of a source, which can be read again and again.

    Attributes:
        source: key and value of the configuration, for messages about the whole.
        rows: given the columns that are needed, or None for all, the rows in their order; a row may have more columns.
    """

    source: str
    rows: Callable[[Collection[str] | None], Iterator[Row]]


def choose_split(names: Sequence[str], key: str, source: str, way_out: str) -> str:
    """The part of a source that `data.train` or `data.eval` means: the only one, or the one with a usual name.

    Args:
        way_out: ends the error message.

    Raises:
        DataError: none is, or several are.
    """
    wanted = ("train",) if key == "data.train" else _HELD_OUT
    found = list(names) if len(names) == 1 else [name for name in names if name in wanted]
    if len(found) != 1:
        raise DataError(f"{key} = {source}: has the parts {', '.join(names) or 'none'}; {way_out}")
    return found[0]
