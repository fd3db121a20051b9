"""Hugging Face weight files, both ways, without holding more than a few megabytes of them."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch

from megatron_async_rlhf.errors import CheckpointError
from megatron_async_rlhf.weights.digest import digest_blocks
from megatron_async_rlhf.weights.stored import (
    DTYPES,
    StoredTensor,
    TensorSpec,
    WeightReader,
    find_tensor,
    read_blocks,
)

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_SHARD_BYTES = 2 * 1024**3
_CODES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_LONGEST_HEADER = 100 * 10**6  # the limit of the safetensors library
_EMBEDDING, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


class SafetensorsDirectory:
    """The weights of a Hugging Face directory, a `WeightReader`."""

    def __init__(self, directory: Path) -> None:
        """
        Raises:
            CheckpointError: no safetensors files, or one that is broken, truncated or of a dtype that is no weight's.
        """
        self.label = str(directory)
        self._stored: dict[str, StoredTensor] = {}
        self.tensors: dict[str, TensorSpec] = {}
        for path, announced in _files_of(directory).items():
            found = self._add(path)
            if missing := [name for name in announced if name not in found]:
                raise CheckpointError(f"{path} has no tensor {missing[0]}, which {INDEX} says it has")
        self._drop_what_is_no_weight(directory)

    def read_into(self, target: torch.Tensor, name: str, row: int, col: int) -> None:
        find_tensor(self, name)
        self._stored[name].read_into(target, row, col)

    def _add(self, path: Path) -> set[str]:
        entries, start = _read_header(path)
        for name, (code, shape, first, end) in sorted(entries.items(), key=lambda item: item[1][2]):
            if name in self.tensors:
                raise CheckpointError(f"{path} has tensor {name}, and so has {self._stored[name].path.name}")
            if code not in _CODES:
                raise CheckpointError(f"{path}: {name} is {code}; only weights in {', '.join(_CODES)} can be read")
            spec = TensorSpec(name, tuple(shape), _CODES[code])
            if end - first != spec.num_bytes:
                raise CheckpointError(f"{path}: {name} of shape {spec.shape} cannot lie in {end - first} bytes")
            rows, cols = spec.matrix
            self._stored[name] = StoredTensor(path, start + first, rows, cols, DTYPES[spec.dtype])
            self.tensors[name] = spec
        return set(entries)

    def _drop_what_is_no_weight(self, directory: Path) -> None:
        """Tensors that Transformers ignores too: rotary tables of old files, and a tied model's second embedding."""
        for name in [name for name in self.tensors if name.endswith(".rotary_emb.inv_freq")]:
            del self.tensors[name]
        if {_EMBEDDING, _OUTPUT} <= self.tensors.keys() and _is_tied(directory):
            first, second = (_digest_of(self, name) for name in (_EMBEDDING, _OUTPUT))
            if first == second:
                del self.tensors[_OUTPUT]


def _files_of(directory: Path) -> dict[Path, list[str]]:
    """The safetensors files, each with the names that the index, where there is one, announces."""
    try:
        weight_map = json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"]
        files: dict[Path, list[str]] = {}
        for name, file in weight_map.items():
            files.setdefault(directory / file, []).append(name)
        return dict(sorted(files.items()))
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{directory / INDEX} cannot be read ({error})") from None
    single = directory / _SINGLE
    paths = [single] if single.is_file() else sorted(directory.glob("*.safetensors"))
    if not paths:
        raise CheckpointError(f"{directory} holds no .safetensors file; save the model with safe_serialization=True")
    return {path: [] for path in paths}


def _read_header(path: Path) -> tuple[dict[str, tuple[str, list[int], int, int]], int]:
    """Dtype code, shape, first and end byte of every tensor of a file, and the byte from which they are counted.

    Raises:
        CheckpointError: it is missing, not a safetensors file, or shorter than its header says.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            text = file.read(min(length, _LONGEST_HEADER))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing, but {INDEX} names it") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error})") from None
    if size < 8 or len(text) < length:
        raise CheckpointError(f"{path} is not a safetensors file, or only the beginning of one")
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        entries = {name: (e["dtype"], e["shape"], *e["data_offsets"]) for name, e in header.items()}
        announced = 8 + length + max((end for _, _, _, end in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: its header cannot be read ({error})") from None
    if size != announced:
        raise CheckpointError(f"{path} is {size} bytes long, but its header describes {announced}: copy it again")
    return entries, 8 + length


def _is_tied(directory: Path) -> bool:
    try:
        return bool(json.loads((directory / "config.json").read_text(encoding="utf-8")).get("tie_word_embeddings"))
    except (OSError, ValueError, AttributeError):
        return False


def _digest_of(reader: WeightReader, name: str) -> bytes:
    spec = reader.tensors[name]
    rows, cols = spec.matrix
    return digest_blocks(read_blocks(reader, name, (0, rows), (0, cols), DTYPES[spec.dtype]))


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


def _write_shard(file: BinaryIO, shard: Sequence[TensorSpec], stream: Iterable[tuple[str, torch.Tensor]]) -> None:
    codes = {name: code for code, name in _CODES.items()}
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


def _write_tensor(file: BinaryIO, spec: TensorSpec, stream: Iterable[tuple[str, torch.Tensor]]) -> None:
    missing = spec.num_bytes
    while missing > 0:
        name, block = next(stream, (None, None))
        if name != spec.name or block.dtype != DTYPES[spec.dtype] or block.nbytes > missing:
            raise CheckpointError(f"expected {missing} bytes of {spec.name} {spec.shape} {spec.dtype}, {name} came")
        file.write(block.detach().contiguous().view(-1).view(torch.uint8).numpy())
        missing -= block.nbytes


def _put_in_place(directory: Path, partial: list[Path], shards: list[list[TensorSpec]]) -> None:
    """Rename complete shards; at no moment do old and new ones look like one model."""
    (directory / INDEX).unlink(missing_ok=True)
    count = len(shards)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    if count == 1:
        names = [_SINGLE]
    for old in (*directory.glob("model-*-of-*.safetensors"), directory / _SINGLE):
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
