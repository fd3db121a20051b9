"""Reads Megatron's `torch_dist` checkpoints a rectangle at a time, by Megatron's own names, without Megatron.

A checkpoint is a set of chunks: boxes of tensors, one rank's share each, saved one after the other into `.distcp` files
by `torch.save`. `.metadata` says which box lies where. How many ranks saved it does not matter to whoever reads boxes.
"""

import io
import os
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

from megatron_async_rlhf.errors import CheckpointError
from megatron_async_rlhf.formats.directory import TENSORS, check_format
from megatron_async_rlhf.formats.metadata import read_metadata
from megatron_async_rlhf.formats.stored import StoredTensor

_LOCAL_HEADER_BYTES = 30  # of a zip record, before its name


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a chunk begins in its matrix, and how large it is."""

    row: int
    col: int
    rows: int
    cols: int


class TorchDistReader:
    """Shapes and values of the tensors in a checkpoint.

    Attributes:
        tensors: by key. What Megatron saves beside tensors is left out.
    """

    def __init__(self, directory: Path) -> None:
        """
        Raises:
            CheckpointError: not a complete `torch_dist` checkpoint.
        """
        check_format(directory)
        self._directory = directory
        metadata = read_metadata(directory / TENSORS)
        self._storage = metadata.storage_data
        self._opened: dict[MetadataIndex, StoredTensor] = {}
        self._check_files()
        entries = metadata.state_dict_metadata.items()
        self.tensors: Mapping[str, TensorStorageMetadata] = {
            key: entry for key, entry in entries if isinstance(entry, TensorStorageMetadata)
        }

    def read_into(self, target: torch.Tensor, key: str, layer: int | None, row: int, col: int) -> None:
        """Fill `target` [r, c] from (row, col) on; `layer` chooses the matrix of a tensor with a layer axis.

        Raises:
            CheckpointError: chunks do not cover the rectangle, or a file cannot be read.
        """
        missing = target.numel()
        for chunk, place in self._chunks(key, layer):
            top, bottom = max(row, place.row), min(row + target.shape[0], place.row + place.rows)
            left, right = max(col, place.col), min(col + target.shape[1], place.col + place.cols)
            if top < bottom and left < right:
                part = target[top - row : bottom - row, left - col : right - col]
                self._open(key, chunk, place).read_into(part, top - place.row, left - place.col)
                missing -= part.numel()
        if missing:
            raise CheckpointError(f"{self._directory}: {missing} elements of {key} are in none of its files")

    def _check_files(self) -> None:
        ends: dict[str, int] = {}
        for info in self._storage.values():
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
        for name, end in ends.items():
            path = self._directory / name
            if not path.is_file():
                raise CheckpointError(f"{path} is missing, but {TENSORS} names it")
            if path.stat().st_size < end:
                raise CheckpointError(f"{path} is {path.stat().st_size} bytes long, but {TENSORS} describes {end}")

    def _chunks(self, key: str, layer: int | None) -> Iterator[tuple[ChunkStorageMetadata, _Place]]:
        for chunk in self.tensors[key].chunks:
            offsets, sizes = (*chunk.offsets, 0), (*chunk.sizes, 1)  # a vector is one column wide
            if layer is not None:
                if offsets[0] != layer:
                    continue
                offsets, sizes = offsets[1:], sizes[1:]
            yield chunk, _Place(offsets[0], offsets[1], sizes[0], sizes[1])

    def _open(self, key: str, chunk: ChunkStorageMetadata, place: _Place) -> StoredTensor:
        index = MetadataIndex(key, chunk.offsets)
        if index not in self._opened:
            if index not in self._storage:
                raise CheckpointError(f"{self._directory / TENSORS} does not say where {key} {index.offset} lies")
            info = self._storage[index]
            path = self._directory / info.relative_path
            try:
                with path.open("rb") as file:
                    header, first = _find_values(_Section(file, info.offset, info.length))
            except (OSError, EOFError, RuntimeError, ValueError, IndexError, zipfile.BadZipFile) as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise CheckpointError(f"{path}: {key} {tuple(chunk.offsets)} cannot be read ({reason})") from None
            dtype = self.tensors[key].properties.dtype
            if header.shape != chunk.sizes or header.dtype != dtype or not header.is_contiguous():
                raise CheckpointError(f"{path}: {key} is {header.dtype} {tuple(header.shape)}, not as {TENSORS} says")
            first += info.offset + header.storage_offset() * dtype.itemsize
            self._opened[index] = StoredTensor(path, first, place.rows, place.cols, dtype)
        return self._opened[index]


class _Section(io.RawIOBase):
    """The part of a file from `offset` on, `length` bytes long, as a file of its own."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        if offset + length > os.fstat(file.fileno()).st_size:
            raise EOFError("its file has become shorter")
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = origin + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer)
        self._file.seek(self._offset + self._at)
        data = self._file.read(max(0, min(len(target), self._length - self._at)))
        target[: len(data)] = data
        self._at += len(data)
        return len(data)


def _find_values(archive: _Section) -> tuple[torch.Tensor, int]:
    """What `torch.save` wrote: the tensor without values, and the byte at which its values begin."""
    header = torch.load(archive, map_location="meta", weights_only=True)
    if not isinstance(header, torch.Tensor):
        raise ValueError("it is not a tensor")
    with zipfile.ZipFile(archive) as records:
        record = next(info for info in records.infolist() if info.filename.endswith("/data/0"))
    archive.seek(record.header_offset)
    local = archive.read(_LOCAL_HEADER_BYTES)
    name_length, extra_length = int.from_bytes(local[26:28], "little"), int.from_bytes(local[28:30], "little")
    return header, record.header_offset + _LOCAL_HEADER_BYTES + name_length + extra_length
