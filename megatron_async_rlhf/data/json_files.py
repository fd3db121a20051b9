"""Rows of files of JSON: lines of objects (`.jsonl`), or one list of them (`.json`); compressed with gzip too.

Without the `datasets` library, which takes seconds to import.
"""

import gzip
import json
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from megatron_async_rlhf.data.rows import Row, Table, choose_split
from megatron_async_rlhf.errors import DataError, RecordError
from megatron_async_rlhf.json_lines import NOT_JSON, JsonLine, json_type, lines_of, other_format

_GZIP = b"\x1f\x8b"


def json_lines_table(path: Path, source: str) -> Table:
    """The lines of a file, each an object; blank ones are skipped."""

    def rows(_: Collection[str] | None) -> Iterator[Row]:
        yield from _lines(_contents(path, source), path)

    return Table(source, rows)


def json_table(path: Path, key: str, source: str) -> Table:
    """The records of a list, or of one of several lists by name; lines of objects are read too, whatever the name says."""

    def rows(_: Collection[str] | None) -> Iterator[Row]:
        content = _contents(path, source)
        if (what := other_format(content)) is not None:
            raise DataError(f"{path}: {what}; it must hold JSON")
        try:
            tree = json.loads(content.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            raise DataError(f"{path}:{line}: not UTF-8 (byte 0x{content[error.start]:02x}); save it as UTF-8") from None
        except json.JSONDecodeError as error:
            if error.msg == "Extra data":
                yield from _lines(content, path)
                return
            what = f"{error.msg.removesuffix(' at')} at column {error.colno}"
            raise DataError(f"{path}:{error.lineno}: not JSON ({what}); was it copied whole?") from None
        except RecursionError:
            raise DataError(f"{path}: not JSON of records (nested too deep)") from None
        name, records = _records(tree, path, key)
        for number, record in enumerate(records, start=1):
            where = f"{path}{name} record {number}"
            yield Row(where, record if isinstance(record, dict) else _no_object(record, where))

    return Table(source, rows)


def _records(tree: Any, path: Path, key: str) -> tuple[str, list[Any]]:
    """The list that is meant, and how to call it behind the file's name."""
    if isinstance(tree, list):
        return "", tree
    if not isinstance(tree, dict):
        raise DataError(f"{path} holds {json_type(tree)}, not a list of records; write one, or a line for each record")
    lists = {
        name: value
        for name, value in tree.items()
        if isinstance(value, list) and any(isinstance(record, dict) for record in value)
    }
    if not lists:
        raise DataError(
            f"{path} holds one object, whose fields ({', '.join(map(repr, tree)) or 'none'}) are no lists of records; write "
            "a list of records, or a line for each"
        )
    name = choose_split(list(lists), key, str(path), "write the list that is meant to a file of its own")
    return f" {name}", lists[name]


def _no_object(record: Any, where: str) -> RecordError:
    return RecordError(f"{where}: {json_type(record)}, not an object", reason=NOT_JSON)


def _lines(content: bytes, path: Path) -> Iterator[Row]:
    for line in lines_of(content, str(path)):
        if isinstance(line, JsonLine):
            yield Row(f"{path}:{line.number}", line.record)
        else:
            yield Row("", line.error)


def _contents(path: Path, source: str) -> bytes:
    """Unpacked, if the file's name says that it is packed."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error.strerror}); check its permissions") from None
    if path.suffix.lower() != ".gz":
        return content
    if not content.startswith(_GZIP):
        raise DataError(f"{path}: is not compressed with gzip; rename it to {path.stem}")
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be unpacked ({error}): was it copied whole?") from None
