"""Writes a stream of tensors as Hugging Face safetensors shards with an index, in bounded memory."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file

_SHARD_BYTES = 2 * 1024**3


def write_safetensors(
    directory: Path, tensors: Iterable[tuple[str, torch.Tensor]], shard_bytes: int = _SHARD_BYTES
) -> None:
    """Write `model-xxxxx-of-yyyyy.safetensors` and the index; one shard becomes plain `model.safetensors`.

    Tensors are written in the order they come; memory stays below one shard plus one tensor.
    """
    directory.mkdir(parents=True, exist_ok=True)
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    total = pending_bytes = 0

    def flush() -> None:
        nonlocal pending_bytes
        if pending:
            save_file(pending, directory / f"shard-{len(shards)}.partial", metadata={"format": "pt"})
            shards.append(list(pending))
            pending.clear()
            pending_bytes = 0

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if pending_bytes + size > shard_bytes:
            flush()
        pending[name] = tensor.contiguous().clone()
        pending_bytes += size
        total += size
    flush()

    weight_map = {}
    for index, names in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"shard-{index}.partial").replace(directory / file)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
