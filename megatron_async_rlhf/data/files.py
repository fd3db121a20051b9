"""Local sources of data: which file or directory a value of the configuration means, and who reads it."""

from pathlib import Path

from megatron_async_rlhf.data.json_files import json_lines_table, json_table
from megatron_async_rlhf.data.rows import Table
from megatron_async_rlhf.errors import DataError

_JSON_LINES = (".jsonl", ".ndjson", ".jsonlines")  # in whatever case, also with .gz behind
_BY_THE_LIBRARY = (".parquet", ".csv", ".tsv", ".arrow", ".txt")
_PACKED = {".gz": "gunzip", ".zst": "unzstd", ".bz2": "bunzip2", ".xz": "unxz", ".zip": "unzip"}
_FORMS = (
    "give `builtin`, a .jsonl, .json, .csv or .parquet file, a directory of such, or `hf:<dataset>[:<config>]:<split>`"
)


def is_local(source: str) -> bool:
    """Whether a value of the configuration means a file or a directory of this machine."""
    return source != "builtin" and not source.startswith("hf:")


def find_local(source: str, key: str, beside: str | None) -> Path:
    """The file or directory that is meant; a relative one is tried in the folder of `beside` first.

    Raises:
        DataError: there is none, or nobody can read its form.
    """
    if not source.strip():
        raise DataError(f"{key} is empty; {_FORMS}")
    path = Path(source)
    places = [path]
    if beside is not None and is_local(beside):
        places = list(dict.fromkeys([Path(beside).parent / path, path]))
    found = next((place for place in places if place.exists()), None)
    if found is None:
        raise DataError(f"{key} = {source}: {_of_nothing(source, places)}")
    if found.is_dir() or _form(found) is not None:
        return found
    raise DataError(f"{key} = {source}: {_of_file(found)}")


def open_local(path: Path, key: str, source: str) -> Table:
    """The rows of what `find_local` has found.

    Raises:
        DataError: it cannot be read.
    """
    form = _form(path)
    if path.is_dir() or form in _BY_THE_LIBRARY:
        from megatron_async_rlhf.data.library import directory_table, file_table

        return directory_table(path, key, source) if path.is_dir() else file_table(path, str(form), source)
    return json_lines_table(path, source) if form in _JSON_LINES else json_table(path, key, source)


def _form(path: Path) -> str | None:
    """The suffix that says how a file is read; None if nobody does."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        suffix = Path(path.stem).suffix.lower()
        return suffix if suffix in (*_JSON_LINES, ".json") else None
    return suffix if suffix in (*_JSON_LINES, ".json", *_BY_THE_LIBRARY) else None


def _of_file(place: Path) -> str:
    """What to do with a file of another kind."""
    suffix = place.suffix.lower()
    if suffix in _PACKED:
        return f"is compressed; unpack it with {_PACKED[suffix]}, and give {place.with_suffix('')}"
    return f"its name does not say how to read it; {_FORMS}"


def _of_nothing(source: str, places: list[Path]) -> str:
    suffixes = (*_PACKED, *_JSON_LINES, ".json", *_BY_THE_LIBRARY)
    if Path(source).suffix.lower() in suffixes or source.startswith(("/", ".", "~")):
        return f"no such file ({' or '.join(str(place.absolute()) for place in places)}); correct the path"
    if source.strip().lower() in ("builtin", "built-in", "built_in"):
        return "write `builtin`"
    if source.count("/") == 1:
        return (
            f"no such file; for a dataset of the Hugging Face hub write hf:{source}:<split>, such as hf:{source}:train"
        )
    return f"no such file; {_FORMS}"
