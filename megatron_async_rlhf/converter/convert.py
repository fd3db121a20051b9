"""Hugging Face directory to Megatron checkpoint and back, a tensor or a part of one at a time."""

from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_async_rlhf.converter.sources import resolve
from megatron_async_rlhf.errors import CheckpointError
from megatron_async_rlhf.formats.directory import HF_DIR, describe_weights, new_directory
from megatron_async_rlhf.formats.file_digests import write_digests
from megatron_async_rlhf.formats.hf_files import SafetensorsDirectory, write_safetensors
from megatron_async_rlhf.formats.open_weights import description_of, open_checked_weights, read_architecture
from megatron_async_rlhf.formats.parameters import Parameter, Share, model_parameters, padded_rows, shares_of
from megatron_async_rlhf.formats.stored import DTYPES, WeightReader, read_blocks
from megatron_async_rlhf.formats.tensor_spec import TensorSpec
from megatron_async_rlhf.formats.writer import Chunk, SavedObject, write_torch_dist
from megatron_async_rlhf.models.architecture import Architecture
from megatron_async_rlhf.models.hf_mapping import check_shapes, hf_shapes
from megatron_async_rlhf.models.layout import Piece
from megatron_async_rlhf.models.layout_rules import (
    check_interleaved_rows,
    check_pipeline_parallel,
    check_tensor_parallel,
)

# Layers of Transformer Engine keep scaling factors in an extra state; others save that they have none.
_WITH_EXTRA_STATE = (
    "self_attention.linear_proj",
    "self_attention.linear_qkv",
    "self_attention.q_layernorm",
    "self_attention.k_layernorm",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
    "decoder.final_layernorm",
)


def import_hf(source: Path, out: Path, *, tensor_parallel: int, pipeline_parallel: int, dtype: str | None) -> None:
    """Write the checkpoint that so many ranks would write, in `dtype` or as the weights are. Memory: one chunk.

    Raises:
        CheckpointError, ConfigError: one line; no part of `out` is left then.
    """
    source = resolve(source)
    description = description_of(source)
    arch = read_architecture(description, check_class=True)
    check_tensor_parallel("--tensor-parallel", tensor_parallel, arch)
    check_interleaved_rows("--tensor-parallel", tensor_parallel, arch)
    check_pipeline_parallel("--pipeline-parallel", pipeline_parallel, arch)
    reader = SafetensorsDirectory(source)
    check_shapes(reader.label, {name: spec.shape for name, spec in reader.tensors.items()}, arch)
    parameters = model_parameters(arch, pipeline_parallel)
    dtypes = _dtypes_of(parameters, reader, dtype)
    ranks: list[list[Chunk | SavedObject]] = [[] for _ in range(tensor_parallel * pipeline_parallel)]
    for parameter in parameters:
        first_rank = parameter.stage * tensor_parallel  # Megatron's order of ranks: tensor, then pipeline
        for share in shares_of(parameter, tensor_parallel):
            chunk = _chunk_of(parameter, share, reader, arch, tensor_parallel, DTYPES[dtypes[parameter.key]])
            ranks[first_rank + share.tensor_rank].append(chunk)
        ranks[first_rank] += _extra_states(parameter, arch)
    with new_directory(out) as directory:
        write_torch_dist(directory, ranks)
        describe_weights(description, directory / HF_DIR, dtypes[parameters[0].key])
        write_digests(directory)


def export_hf(source: Path, out: Path, *, dtype: str | None, config: Path | None = None) -> None:
    """Write a Hugging Face directory from a checkpoint, or from the last policy of a run. Memory: a few megabytes.

    Args:
        config: Hugging Face directory with config and tokenizer, for a checkpoint that Megatron saved by itself.

    Raises:
        CheckpointError: one line; no part of `out` is left then.
    """
    source = resolve(source)
    description = description_of(source, config, "a checkpoint that Megatron saved, or a run")
    arch = read_architecture(description)
    reader = open_checked_weights(source, config)
    check_shapes(reader.label, {name: spec.shape for name, spec in reader.tensors.items()}, arch)
    specs = [TensorSpec(name, shape, dtype or reader.tensors[name].dtype) for name, shape in hf_shapes(arch).items()]
    with new_directory(out) as directory:
        describe_weights(description, directory, specs[0].dtype)
        write_safetensors(directory, specs, _stream(reader, specs))


def _dtypes_of(parameters: list[Parameter], reader: WeightReader, dtype: str | None) -> dict[str, str]:
    """Dtype of each key of the checkpoint. A key has one, though many Hugging Face tensors lie under it."""
    found: dict[str, tuple[str, str]] = {}
    for parameter in parameters:
        for piece in parameter.pieces:
            here = dtype or reader.tensors[piece.tensor].dtype
            other, first = found.setdefault(parameter.key, (here, piece.tensor))
            if here != other:
                raise CheckpointError(
                    f"{reader.label}: {first} is {other} and {piece.tensor} is {here}, but Megatron keeps both in one "
                    f"tensor; give --dtype"
                )
    return {key: name for key, (name, _) in found.items()}


def _chunk_of(
    parameter: Parameter, share: Share, reader: WeightReader, arch: Architecture, ranks: int, dtype: torch.dtype
) -> Chunk:
    shape: tuple[int, ...] = (padded_rows(parameter, ranks), parameter.cols)
    offsets: tuple[int, ...] = (share.row, share.col)
    sizes: tuple[int, ...] = (share.rows, share.cols)
    if parameter.is_vector:
        shape, offsets, sizes = shape[:1], offsets[:1], sizes[:1]
    if parameter.layer is not None:
        shape, offsets, sizes = (arch.layers, *shape), (parameter.layer, *offsets), (1, *sizes)

    def make() -> torch.Tensor:
        values = torch.zeros(share.rows, share.cols, dtype=dtype)  # zero where the vocabulary is padded
        for piece in parameter.pieces:
            top, bottom = max(share.row, piece.row), min(share.row + share.rows, piece.row + _height(piece))
            if top < bottom:
                rows = values[top - share.row : bottom - share.row]
                reader.read_into(rows, piece.tensor, piece.rows[0] + top - piece.row, piece.cols[0] + share.col)
        return values.view(sizes)

    return Chunk(key=parameter.key, shape=shape, dtype=dtype, offsets=offsets, sizes=sizes, make=make)


def _height(piece: Piece) -> int:
    return piece.rows[1] - piece.rows[0]


def _extra_states(parameter: Parameter, arch: Architecture) -> Iterator[SavedObject]:
    module, _, kind = parameter.key.rpartition(".")
    if kind == "weight" and module.endswith(_WITH_EXTRA_STATE):
        shard = "0_1" if parameter.layer is None else f"{parameter.layer}_{arch.layers}"
        yield SavedObject(key=f"{module}._extra_state/shard_{shard}", value=[None])


def _stream(reader: WeightReader, specs: list[TensorSpec]) -> Iterator[tuple[str, torch.Tensor]]:
    for spec in specs:
        rows, cols = spec.matrix
        for block in read_blocks(reader, spec.name, (0, rows), (0, cols), DTYPES[spec.dtype]):
            yield spec.name, block
