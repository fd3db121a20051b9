"""Examples from a JSONL file: one JSON object per line."""

from pathlib import Path

from megatron_async_rlhf.config.sections import DataSection
from megatron_async_rlhf.data.example import Example
from megatron_async_rlhf.data.record import example_of
from megatron_async_rlhf.errors import DataError
from megatron_async_rlhf.json_lines import read_json_lines

_FORMS = "give `builtin`, a .jsonl file or `hf:<dataset>[:<config>]:<split>`"
_PACKED = {".gz": "gunzip", ".zst": "unzstd", ".bz2": "bunzip2", ".xz": "unxz", ".zip": "unzip"}
_JSON_LINES = (".ndjson", ".jsonlines", ".jsonl")  # in whatever case
_BY_THE_LIBRARY = (".parquet", ".csv", ".json", ".txt", ".arrow")


def find_jsonl(source: str, key: str, beside: str | None) -> Path:
    """The file meant by a configuration value; a relative one is tried in the folder of `beside` first.

    Raises:
        DataError: no such file, a directory, or not a form of source at all.
    """
    if not source.strip():
        raise DataError(f"{key} is empty; {_FORMS}")
    path = Path(source)
    places = [path]
    if beside is not None and beside.endswith(".jsonl"):
        places = list(dict.fromkeys([Path(beside).parent / path, path]))
    for place in places:
        if place.is_dir():
            raise DataError(f"{key} = {source} is a directory; {_of_directory(place)}")
        if place.exists() and path.suffix == ".jsonl":
            return place
    if path.suffix != ".jsonl":
        found = next((place for place in places if place.exists()), None)
        raise DataError(f"{key} = {source}: {_of_name(source) if found is None else _of_file(found)}")
    tried = " or ".join(str(place.absolute()) for place in places)
    raise DataError(f"{key} = {source}: no such file ({tried}); correct the path")


def read_jsonl(path: Path, key: str, data: DataSection) -> list[Example]:
    """All examples of a file; blank lines are skipped, other fields ignored.

    Raises:
        DataError: the file cannot be read, has no prompts, or a line is wrong (named as file:line).
    """
    try:
        examples = [example_of(line.record, f"{path}:{line.number}", data) for line in read_json_lines(path)]
    except OSError as error:
        raise DataError(f"{key} = {path}: cannot be read ({error.strerror}); check its permissions") from None
    if not examples:
        raise DataError(f"{key} = {path}: has no prompts; give a file with at least one line")
    return examples


def _of_directory(place: Path) -> str:
    if (place / "state.json").is_file() or (place / "dataset_dict.json").is_file():
        return "what `save_to_disk` of the datasets library made; write it with `to_json(FILE.jsonl)` and give that"
    return f"give a .jsonl file, or hf:{place}:train for a directory that the datasets library can load"


def _of_file(place: Path) -> str:
    """What to do with a file of another kind."""
    suffix = place.suffix.lower()
    if suffix in _PACKED:
        return f"is compressed; unpack it with {_PACKED[suffix]}, and give the .jsonl file"
    if suffix in _JSON_LINES:
        return f"rename it to {place.stem}.jsonl, which is how JSON lines are known"
    if suffix in _BY_THE_LIBRARY:
        return f"write hf:{place}:train, which reads it through the datasets library"
    return f"is no .jsonl file; {_FORMS}"


def _of_name(source: str) -> str:
    path = Path(source)
    suffix = path.suffix.lower()
    if suffix in (*_PACKED, *_JSON_LINES, *_BY_THE_LIBRARY):
        return f"no such file ({path.absolute()}); correct the path"
    if source.strip().lower() in ("builtin", "built-in", "built_in"):
        return "write `builtin`"
    if source.count("/") == 1 and not source.startswith(("/", ".", "~")):
        return (
            f"no such file; for a dataset of the Hugging Face hub write hf:{source}:<split>, such as hf:{source}:train"
        )
    return _FORMS
