"""Digests of all files of a directory, in one file beside them: what was written is what is there, or the first file that is
not is named. No torch.

They find accidents, not attacks: whoever changes a file can change its digest.
"""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import xxhash

from megatron_async_rlhf.errors import CheckpointError

DIGESTS = "digests.json"
_ALGORITHM = "xxh3-128"
_BLOCK_BYTES = 8 * 2**20
_THREADS = 8  # files are read at once: hashing and reading leave the interpreter's lock alone


class FileDigest(NamedTuple):
    """Of one file: how many bytes it has, and their xxh3-128 in hexadecimal."""

    size: int
    digest: str


def digest_file(path: Path) -> FileDigest:
    """Raises OSError."""
    hasher, size = xxhash.xxh3_128(), 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            hasher.update(block)
            size += len(block)
    return FileDigest(size, hasher.hexdigest())


def write_digests(directory: Path, known: Mapping[str, FileDigest] = {}) -> None:
    """Of every file in the directory, by its path in it.

    Args:
        known: of files that whoever wrote them has hashed.

    Raises:
        OSError: a file cannot be read, or the digests not be written.
    """
    names = [name for name in _files_of(directory) if name not in known]
    digests = dict(known) | dict(zip(names, _digest_all(directory, names), strict=True))
    (directory / DIGESTS).write_text(_encode(digests), encoding="utf-8")


def read_digests(directory: Path) -> dict[str, FileDigest] | None:
    """By path in the directory; None if there are none, as in what earlier versions have written.

    Raises:
        CheckpointError: they are broken.
    """
    path = directory / DIGESTS
    if not path.exists():
        return None
    try:
        content = path.read_text(encoding="utf-8")
        digests = {name: FileDigest(*entry) for name, entry in json.loads(content)["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is broken ({type(error).__name__})") from None
    if content != _encode(digests):
        raise CheckpointError(f"{path} is broken: it is not as it was written")
    return digests


def check_digests(directory: Path) -> int:
    """Compare every file with its digest.

    Returns:
        How many bytes were read; 0 if the directory has no digests.

    Raises:
        CheckpointError: one line naming the first file that is missing, of another length, changed, or not known.
    """
    digests = read_digests(directory)
    if digests is None:
        return 0
    there = set(_files_of(directory))
    for name, expected in digests.items():
        path = directory / name
        if name not in there:
            raise CheckpointError(f"{path} is missing")
        if (size := path.stat().st_size) != expected.size:
            raise CheckpointError(f"{path} has {size} bytes, and not the {expected.size} that were written")
    if unknown := sorted(there - digests.keys()):
        raise CheckpointError(f"{directory / unknown[0]} was not there when the checkpoint was written")
    try:
        for name, found in zip(digests, _digest_all(directory, list(digests)), strict=True):
            if found != digests[name]:
                raise CheckpointError(f"{directory / name} is not what was written: its digest differs")
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read ({error.strerror or error})") from None
    return sum(digest.size for digest in digests.values())


def _files_of(directory: Path) -> list[str]:
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return [name for path in files if (name := path.relative_to(directory).as_posix()) != DIGESTS]


def _digest_all(directory: Path, names: list[str]) -> list[FileDigest]:
    with ThreadPoolExecutor(_THREADS) as threads:
        return list(threads.map(lambda name: digest_file(directory / name), names))


def _encode(digests: Mapping[str, FileDigest]) -> str:
    files = {name: list(digests[name]) for name in sorted(digests)}
    return json.dumps({"algorithm": _ALGORITHM, "files": files}, indent=1) + "\n"
