"""JSON lines: the one reader for what users bring and for what runs write.

A line ends at `\\n` and nowhere else. Text may hold U+2028, U+2029, U+0085 and other characters at which Python's
`str.splitlines` would cut it in two.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from msgspec import Struct

from megatron_async_rlhf.errors import DataError, RecordError

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_ONE_OBJECT = "each line must be one JSON object"
# How files begin that are no text, and what to do with them.
_OTHER_FORMATS = {
    b"PAR1": "is a Parquet file",
    b"ARROW1": "is an Arrow file",
    b"\x1f\x8b": "is compressed with gzip; unpack it with gunzip",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd; unpack it with unzstd",
    b"BZh": "is compressed with bzip2; unpack it with bunzip2",
    b"\xfd7zXZ": "is compressed with xz; unpack it with unxz",
    b"PK\x03\x04": "is a zip archive; unpack it with unzip",
    b"\xff\xfe": "is UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "is UTF-16 text; save it as UTF-8",
    b"version https://git-lfs": "is a Git LFS pointer, not the data; get it with git lfs pull",
    b"<!DOCTYPE": "is a web page, not the data; download the file itself",
    b"<!doctype": "is a web page, not the data; download the file itself",
    b"<html": "is a web page, not the data; download the file itself",
}
NOT_JSON = "no JSON object"  # a reason for which a record is bad


class JsonLine(Struct, frozen=True):
    """One line that is not blank.

    Attributes:
        number: of the line in its file, counted from 1.
        raw: its bytes, without the line end.
    """

    number: int
    raw: bytes
    record: dict[str, Any]


class BadLine(Struct, frozen=True):
    """A line that is no JSON object.

    Attributes:
        is_cut: it is the last one and has no line end.
    """

    error: RecordError
    is_cut: bool


def read_json_lines(path: Path, *, may_be_cut: bool = False) -> Iterator[JsonLine]:
    """The objects of a file, a line each; blank lines are skipped. Windows line ends and a byte order mark do not matter.

    Args:
        may_be_cut: a last line without a line end may be half of one, and is left out then: who wrote it was killed.

    Raises:
        OSError: the file cannot be read.
        DataError: a line is no JSON object (named as file:line), or the file is something else.
    """
    for line in lines_of(path.read_bytes(), str(path)):
        if isinstance(line, JsonLine):
            yield line
        elif may_be_cut and line.is_cut:
            return
        else:
            raise line.error


def lines_of(content: bytes, name: str) -> Iterator[JsonLine | BadLine]:
    """The lines in the contents of the file `name`, as in `read_json_lines`; but bad ones are passed on.

    Raises:
        DataError: the file is something else.
    """
    if (what := other_format(content)) is not None:
        raise DataError(f"{name}: {what}; it must hold JSON lines")
    lines = content.split(b"\n")
    for number, line in enumerate(lines, start=1):
        raw = line.removeprefix(_BYTE_ORDER_MARK)  # in the middle of a file too: files are put together with `cat`
        if not raw.strip():
            continue
        has_no_end = number == len(lines)
        try:
            yield JsonLine(number, raw, _parse(raw, f"{name}:{number}", has_no_end))
        except RecordError as error:
            yield BadLine(error, has_no_end)


def other_format(content: bytes) -> str | None:
    """What a file is that begins like this, and what to do with it; None if it may be text."""
    return next((what for start, what in _OTHER_FORMATS.items() if content.startswith(start)), None)


def _parse(raw: bytes, where: str, has_no_end: bool) -> dict[str, Any]:
    """`has_no_end`: it is the last line and no line end follows, so that it may have been cut off."""
    if raw.strip(b"\0 \t\r") == b"":
        raise _bad(f"{where}: only NUL bytes, which a crash of the machine leaves; remove the line")
    try:
        record = json.loads(raw.decode("utf-8"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise _bad(
            f"{where}: not UTF-8 (byte 0x{raw[error.start]:02x} at column {error.start + 1}); save the file as UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        what = f"{error.msg.removesuffix(' at')} at column {error.colno}"
        raise _bad(f"{where}: not JSON ({what}); {_way_out(raw, has_no_end)}") from None
    except (ValueError, RecursionError) as error:
        raise _bad(f"{where}: not JSON ({error}); {_ONE_OBJECT}") from None
    if not isinstance(record, dict):
        renamed = ", or call the file .json if it is one list of them" if isinstance(record, list) else ""
        raise _bad(f"{where}: {json_type(record)}, not an object; {_ONE_OBJECT}{renamed}")
    if isinstance(record, _Repeating):
        raise _bad(f"{where}: field {record.name!r} is there twice; remove one")
    return record


def _bad(message: str) -> RecordError:
    return RecordError(message, reason=NOT_JSON)


def _way_out(raw: bytes, has_no_end: bool) -> str:
    text = raw.strip()
    if text in (b"[", b"{") or text.startswith((b"[{", b"[ {")):
        return f"{_ONE_OBJECT}: `jq -c '.[]' FILE` makes lines of a list, `jq -c . FILE` of objects over several lines"
    if b"\r{" in raw:
        return f"{_ONE_OBJECT}, and lines end with \\n, not with \\r alone"
    if b"\0" in raw:
        return f"there are NUL bytes in it; {_ONE_OBJECT}"
    if has_no_end:
        return f"the file ends in the middle of this line: was it copied whole? {_ONE_OBJECT}"
    return _ONE_OBJECT


def json_type(value: Any) -> str:
    """What JSON calls a value of its type, with an article."""
    names = {str: "a string", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return next((name for kind, name in names.items() if isinstance(value, kind)), "null")


class _Repeating(dict):
    """An object with a field twice, of which Python's json would keep the last."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        names = [name for name, _ in pairs]
        self.name = next(name for name in names if names.count(name) > 1)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    return record if len(record) == len(pairs) else _Repeating(pairs)
