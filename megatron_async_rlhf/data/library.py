"""Rows that the `datasets` library reads: tables in files, directories of files, and what it has saved itself.

The library is imported where it is used: it takes a second, and most runs do without.
"""

import csv
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from megatron_async_rlhf.data.rows import Row, Table, choose_split
from megatron_async_rlhf.errors import DataError
from megatron_async_rlhf.hub import described
from megatron_async_rlhf.json_lines import other_format

_BUILDERS = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow", ".txt": "text"}
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_PARQUET, _LONGEST_START = b"PAR1", 32


def file_table(path: Path, form: str, source: str) -> Table:
    """The rows of a file, counted from 0 as the library does.

    Args:
        form: the suffix that says how it is read.

    Raises:
        DataError: it is no such file.
    """
    options = _check_form(path, form, source)

    def load() -> Any:
        import datasets

        if form in _DELIMITERS:
            # As text: an answer such as 42 or NA is one too.
            options["features"] = datasets.Features({name: datasets.Value("string") for name in options["features"]})
        # Streaming leaves no copy of the file in the library's cache.
        return datasets.load_dataset(_BUILDERS[form], data_files=str(path), split="train", streaming=True, **options)

    return Table(source, lambda columns: rows_of(loaded(load, source), str(path), columns, source))


def directory_table(path: Path, key: str, source: str) -> Table:
    """The rows of a directory that `save_to_disk` made, or of one with files that `load_dataset` finds.

    Raises:
        DataError: it is neither, or has several parts of which none is clearly meant.
    """

    def load() -> Any:
        import datasets

        dataset = datasets.load_from_disk(str(path)) if is_saved(path) else datasets.load_dataset(str(path))
        if not isinstance(dataset, dict):
            return dataset
        way_out = f"write hf:{path}:<part>"
        return dataset[choose_split([str(name) for name in dataset], key, source.partition(" = ")[2], way_out)]

    dataset = cache(lambda: loaded(load, source))
    return Table(source, lambda columns: rows_of(dataset(), str(path), columns, source))


def is_saved(path: Path) -> bool:
    """Whether `save_to_disk` of the library made this directory."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def rows_of(dataset: Any, name: str, columns: Collection[str] | None, source: str) -> Iterator[Row]:
    """The rows of a dataset of the library.

    Raises:
        DataError: one cannot be read.
    """
    known = dataset.column_names  # None of a stream that has yet to begin
    if columns is not None and known is not None and set(columns) <= set(known):
        dataset = dataset.select_columns(list(columns))  # the others may be large
    for number, row in enumerate(_each(dataset, source)):
        yield Row(f"{name} row {number}", row)


def loaded(load: Callable[[], Any], source: str, advice: str = "check the file") -> Any:
    """What the library loads.

    Raises:
        DataError: one line on why it cannot.
    """
    try:
        return load()
    except DataError:
        raise
    except ModuleNotFoundError as error:
        raise DataError(f"{source}: {error.name} is not installed, which reads it; install `datasets`") from None
    except Exception as error:  # the library and what is below it raise dozens of types
        raise DataError(f"{source}: datasets cannot load it ({described(error)}); {advice}") from None


def _each(dataset: Iterable[Any], source: str) -> Iterator[Any]:
    rows = iter(dataset)
    while True:
        try:
            yield next(rows)
        except StopIteration:
            return
        except Exception as error:  # as above; a stream finds out on the way
            advice = "save it as UTF-8" if isinstance(error, UnicodeDecodeError) else "check the file"
            raise DataError(f"{source}: datasets cannot read it ({described(error)}); {advice}") from None


def _check_form(path: Path, form: str, source: str) -> dict[str, Any]:
    """Options with which the library reads a file, whose beginning must be what its name says."""
    try:
        with path.open("rb") as file:
            start = file.read(_LONGEST_START)
        what = other_format(start)
        if form == ".parquet" and not start.startswith(_PARQUET):
            raise DataError(f"{path}: {what or 'is no Parquet file'}; it must hold Parquet")
        if form in _DELIMITERS or form == ".txt":
            if what is not None:
                raise DataError(f"{path}: {what}; it must hold text")
        return _csv_options(path, _DELIMITERS[form]) if form in _DELIMITERS else {}
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error.strerror}); check its permissions") from None


def _csv_options(path: Path, delimiter: str) -> dict[str, Any]:
    try:
        # The library finds out where it is not UTF-8.
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            columns = next(csv.reader(file, delimiter=delimiter), [])
    except csv.Error as error:
        raise DataError(f"{path}:1: the names of the columns cannot be read ({error})") from None
    if not columns:
        raise DataError(f"{path}:1: there are no names of columns; write them into the first line")
    if twice := next((name for name in columns if columns.count(name) > 1), None):
        raise DataError(f"{path}:1: column {twice!r} is there twice; rename one")
    return {"features": columns, "delimiter": delimiter, "na_filter": False}
