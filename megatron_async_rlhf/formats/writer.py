"""Writes Megatron's `torch_dist` format a chunk at a time, without Megatron and without process groups.

torch's own `FileSystemWriter` writes the same bytes, but keeps every tensor of a file alive until the file is done.
"""

import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_async_rlhf.formats.directory import COMMON, TENSORS, write_format


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A box of a tensor, as one rank saves it. `make` gives its values when its turn to be written comes."""

    key: str
    shape: tuple[int, ...]  # of the whole tensor
    dtype: torch.dtype
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    make: Callable[[], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class SavedObject:
    """Anything but a tensor, saved under its key."""

    key: str
    value: object


def write_torch_dist(directory: Path, ranks: list[list[Chunk | SavedObject]]) -> None:
    """Write a `.distcp` file per rank, then the metadata that makes them a checkpoint. Memory: one chunk."""
    metadata = Metadata({}, storage_data={}, storage_meta=StorageMeta(), version=CURRENT_DCP_VERSION)
    for rank, items in enumerate(ranks):
        name = f"__{rank}_0.distcp"
        with (directory / name).open("wb") as file:
            for item in items:
                _write(file, name, item, metadata)
            _flush(file)
    with (directory / COMMON).open("wb") as file:
        torch.save({}, file)
        _flush(file)
    with (directory / TENSORS).open("wb") as file:
        pickle.dump(metadata, file)
        _flush(file)
    write_format(directory)


def _write(file: BinaryIO, name: str, item: Chunk | SavedObject, metadata: Metadata) -> None:
    offset = file.tell()
    entries = metadata.state_dict_metadata
    if isinstance(item, Chunk):
        _save(item.make(), file)
        index = MetadataIndex(item.key, item.offsets)
        whole = TensorStorageMetadata(TensorProperties(dtype=item.dtype), torch.Size(item.shape), [])
        box = ChunkStorageMetadata(offsets=torch.Size(item.offsets), sizes=torch.Size(item.sizes))
        entries.setdefault(item.key, whole).chunks.append(box)
    else:
        _save(item.value, file)
        index = MetadataIndex(item.key)
        entries[item.key] = BytesStorageMetadata()
    metadata.storage_data[index] = _StorageInfo(name, offset, file.tell() - offset)


def _save(value: object, file: BinaryIO) -> None:
    try:
        torch.save(value, file)
    except RuntimeError as error:
        # When the disk is full, torch fails once more while it gives up, and hides what was wrong.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
