"""Examples from a JSONL file: one JSON object per line."""

import json
from pathlib import Path

from megatron_async_rlhf.data.example import Example
from megatron_async_rlhf.data.record import example_of
from megatron_async_rlhf.errors import DataError


def find_jsonl(source: str, key: str, beside: str | None) -> Path:
    """The file meant by a configuration value; a relative one is tried in the folder of `beside` first.

    Raises:
        DataError: no such file, a directory, or not a form of source at all.
    """
    path = Path(source)
    places = [path]
    if beside is not None and beside.endswith(".jsonl"):
        places = list(dict.fromkeys([Path(beside).parent / path, path]))
    for place in places:
        if place.is_dir():
            raise DataError(f"{key} = {source}: {place} is a directory; give a .jsonl file")
        if place.exists() and path.suffix == ".jsonl":
            return place
    if path.suffix != ".jsonl":
        raise DataError(f"{key} = {source}: give `builtin`, a .jsonl file or `hf:<dataset>[:<config>]:<split>`")
    tried = " or ".join(str(place.absolute()) for place in places)
    raise DataError(f"{key} = {source}: no such file ({tried}); correct the path")


def read_jsonl(path: Path, key: str, prompt_field: str, solution_field: str | None) -> list[Example]:
    """All examples of a file; blank lines are skipped, other fields ignored.

    Raises:
        DataError: the file cannot be read, has no prompts, or a line is wrong (named as file:line).
    """
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise DataError(f"{key} = {path}: cannot be read ({error.strerror}); check its permissions") from None
    examples = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line.decode())
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not JSON ({error}); each line must be one JSON object") from None
        if not isinstance(record, dict):
            raise DataError(
                f"{where}: a JSON {type(record).__name__}, not an object; each line must be one JSON object"
            )
        examples.append(example_of(record, where, prompt_field, solution_field))
    if not examples:
        raise DataError(f"{key} = {path}: has no prompts; give a file with at least one line")
    return examples
