"""Reads what W&B keeps of an offline run: records of its own kind in LevelDB's log format."""

import json
from collections.abc import Iterator
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record

_FILE_HEADER, _BLOCK, _HEADER = 7, 32768, 7
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def records(path: Path) -> Iterator[Record]:
    data, position, parts = path.read_bytes(), _FILE_HEADER, b""
    while position + _HEADER <= len(data):
        if _BLOCK - position % _BLOCK < _HEADER:  # the rest of a block is padding
            position += _BLOCK - position % _BLOCK
            continue
        size, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        if kind not in (_FULL, _FIRST, _MIDDLE, _LAST):
            return
        parts += data[position + _HEADER : position + _HEADER + size]
        position += _HEADER + size
        if kind in (_FULL, _LAST):
            yield Record.FromString(parts)
            parts = b""


def run_ids(run_dir: Path) -> set[str]:
    return {r.run.run_id for path in _files(run_dir) for r in records(path) if r.HasField("run")}


def rows(run_dir: Path) -> dict[int, dict]:
    """By W&B's own number of the row; of one that was written more than once, the last."""
    found: dict[int, dict] = {}
    for path in _files(run_dir):
        for record in records(path):
            if record.HasField("history"):
                items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                found[items["_step"]] = items
    return found


def _files(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "wandb").glob("offline-run-*/*.wandb"))
