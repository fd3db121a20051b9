"""Hugging Face weight files, both ways, without holding more than a few megabytes of them."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch

from megatron_async_rlhf.errors import CheckpointError
from megatron_async_rlhf.formats.safetensors_files import CODES, INDEX, SINGLE, find_weights
from megatron_async_rlhf.formats.stored import DTYPES, StoredTensor, find_tensor
from megatron_async_rlhf.formats.tensor_spec import TensorSpec

_SHARD_BYTES = 2 * 1024**3


class SafetensorsDirectory:
    """The weights of a Hugging Face directory, a `WeightReader`."""

    def __init__(self, directory: Path) -> None:
        """
        Raises:
            CheckpointError: see `find_weights`.
        """
        places = find_weights(directory)
        self.label = str(directory)
        self.tensors: dict[str, TensorSpec] = {name: place.spec for name, place in places.items()}
        self._stored = {
            name: StoredTensor(place.path, place.offset, *place.spec.matrix, DTYPES[place.spec.dtype])
            for name, place in places.items()
        }

    def read_into(self, target: torch.Tensor, name: str, row: int, col: int) -> None:
        """As `WeightReader.read_into`."""
        find_tensor(self, name)
        self._stored[name].read_into(target, row, col)


def write_safetensors(
    directory: Path,
    specs: Sequence[TensorSpec],
    tensors: Iterable[tuple[str, torch.Tensor]],
    shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Write `model-xxxxx-of-yyyyy.safetensors` and the index; one shard becomes plain `model.safetensors`.

    Shapes are known beforehand, so every header is written first and nothing is held: memory is what `tensors` holds.
    An export that is interrupted leaves the directory without a complete model; an earlier one is replaced.

    Args:
        tensors: name and values in the order of `specs`, each tensor whole or as several blocks of its rows.

    Raises:
        CheckpointError: the stream does not bring what `specs` announce.
    """
    directory.mkdir(parents=True, exist_ok=True)
    shards = _plan_shards(specs, shard_bytes)
    partial = [directory / f"shard-{index}.partial" for index in range(len(shards))]
    stream = iter(tensors)
    try:
        for path, shard in zip(partial, shards, strict=True):
            with path.open("wb") as file:
                _write_shard(file, shard, stream)
                file.flush()
                os.fsync(file.fileno())
        if (extra := next(stream, None)) is not None:
            raise CheckpointError(f"tensor {extra[0]} came after all that were announced")
        _put_in_place(directory, partial, shards)
    finally:
        for path in partial:
            path.unlink(missing_ok=True)


def _plan_shards(specs: Sequence[TensorSpec], limit_bytes: int) -> list[list[TensorSpec]]:
    """Consecutive tensors grouped so that a file stays within the limit; a larger tensor is alone in its own."""
    shards: list[list[TensorSpec]] = []
    filled = 0
    for spec in specs:
        if not shards or filled + spec.num_bytes > limit_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += spec.num_bytes
    return shards


def _write_shard(file: BinaryIO, shard: Sequence[TensorSpec], stream: Iterator[tuple[str, torch.Tensor]]) -> None:
    codes = {name: code for code, name in CODES.items()}
    offsets, end = {}, 0
    # Wider elements first, as the safetensors library does it, so that every tensor is aligned to its elements.
    for spec in sorted(shard, key=lambda spec: -DTYPES[spec.dtype].itemsize):
        offsets[spec.name] = end
        end += spec.num_bytes
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for spec in shard:
        extent = [offsets[spec.name], offsets[spec.name] + spec.num_bytes]
        header[spec.name] = {"dtype": codes[spec.dtype], "shape": list(spec.shape), "data_offsets": extent}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for spec in shard:
        file.seek(8 + len(text) + offsets[spec.name])
        _write_tensor(file, spec, stream)


def _write_tensor(file: BinaryIO, spec: TensorSpec, stream: Iterator[tuple[str, torch.Tensor]]) -> None:
    missing = spec.num_bytes
    while missing > 0:
        name, block = next(stream, (None, None))
        if block is None or name != spec.name or block.dtype != DTYPES[spec.dtype] or block.nbytes > missing:
            raise CheckpointError(f"expected {missing} bytes of {spec.name} {spec.shape} {spec.dtype}, {name} came")
        file.write(block.detach().contiguous().view(-1).view(torch.uint8).numpy())
        missing -= block.nbytes


def _put_in_place(directory: Path, partial: list[Path], shards: list[list[TensorSpec]]) -> None:
    """Rename complete shards; at no moment do old and new ones look like one model."""
    (directory / INDEX).unlink(missing_ok=True)
    count = len(shards)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    if count == 1:
        names = [SINGLE]
    for old in (*directory.glob("model-*-of-*.safetensors"), directory / SINGLE):
        if old.name not in names:
            old.unlink(missing_ok=True)
    weight_map: dict[str, str] = {}
    for name, path, shard in zip(names, partial, shards, strict=True):
        path.replace(directory / name)
        weight_map |= dict.fromkeys((spec.name for spec in shard), name)
    if count > 1:
        total = sum(spec.num_bytes for shard in shards for spec in shard)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        temporary = directory / f"{INDEX}.partial"
        temporary.write_text(json.dumps(index, indent=1), encoding="utf-8")
        temporary.replace(directory / INDEX)
