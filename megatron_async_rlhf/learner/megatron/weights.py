"""The policy's weights in Hugging Face coordinates: read into this rank's shards, or gathered whole on rank 0."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel

from megatron_async_rlhf.checkpoint.sources import open_weights
from megatron_async_rlhf.config.architecture import Architecture
from megatron_async_rlhf.errors import MappingError
from megatron_async_rlhf.learner.megatron.parallel import Placement
from megatron_async_rlhf.weights.families import Rule
from megatron_async_rlhf.weights.hf_mapping import PlacedMapping, copies_of_tied_embedding, hf_shapes, model_mappings
from megatron_async_rlhf.weights.reshard import merge, split
from megatron_async_rlhf.weights.stored import read_tensor

HFTensorReader = Callable[[str], torch.Tensor]


@torch.no_grad()
def load_weights(model: GPTModel, arch: Architecture, placement: Placement, read: HFTensorReader) -> None:
    """Fill this rank's parameters from whole Hugging Face tensors; only the tensors it needs are read.

    Raises:
        MappingError: a tensor whose shape does not fit the architecture.
    """
    parameters = dict(model.named_parameters())
    shapes = hf_shapes(arch)
    stages = placement.pipeline_parallel
    for mapping in (*model_mappings(arch, stages), *copies_of_tied_embedding(arch, stages)):
        if mapping.stage != placement.pipeline_rank:
            continue
        tensors = [read(name) for name in mapping.hf]
        for name, tensor in zip(mapping.hf, tensors, strict=True):
            if tuple(tensor.shape) != shapes[name]:
                raise MappingError(f"{name} has shape {tuple(tensor.shape)}, the configured model needs {shapes[name]}")
        shard = split(mapping.rule, tensors, arch, placement.tensor_parallel, placement.tensor_rank)
        parameters.pop(mapping.megatron).copy_(shard)
    if parameters:
        raise MappingError(f"no Hugging Face tensor is mapped to {sorted(parameters)[0]}; the family's table lacks it")


@torch.no_grad()
def gather_weights(model: GPTModel, arch: Architecture, placement: Placement) -> Iterator[tuple[str, torch.Tensor]]:
    """Whole Hugging Face tensors, one mapping at a time, on rank 0; the other ranks send and yield nothing.

    Collective: every rank of data-parallel replica 0 must exhaust it. Tensors are views or fresh copies and
    stay valid only until the next one is asked for.
    """
    if placement.data_rank:
        return
    parameters = dict(model.named_parameters())
    shapes = hf_shapes(arch)
    for mapping in model_mappings(arch, placement.pipeline_parallel):
        owners = [_rank_of(placement, mapping.stage, t) for t in range(placement.tensor_parallel)]
        mine = parameters[mapping.megatron].detach() if placement.rank in owners else None
        if placement.rank != 0:
            if mine is not None:
                dist.send(mine.contiguous(), dst=0)
            continue
        shards = [mine if owner == 0 else _receive(owner, mapping, shapes, arch, placement) for owner in owners]
        yield from zip(mapping.hf, merge(mapping.rule, shards, arch), strict=True)


def _rank_of(placement: Placement, stage: int, tensor_rank: int) -> int:
    """Global rank in data-parallel replica 0, in Megatron's order tp-cp-ep-dp-pp."""
    return (stage * placement.data_parallel) * placement.tensor_parallel + tensor_rank


def _receive(
    source: int,
    mapping: PlacedMapping,
    shapes: dict[str, tuple[int, ...]],
    arch: Architecture,
    placement: Placement,
) -> torch.Tensor:
    whole = [torch.empty(shapes[name], device="meta") for name in mapping.hf]
    buffer = torch.empty(split(mapping.rule, whole, arch, placement.tensor_parallel, 0).shape)
    dist.recv(buffer, src=source)
    return buffer


def stored_weights(directory: Path) -> HFTensorReader:
    """Reads single tensors of a Hugging Face directory or of an imported checkpoint, in float32.

    Raises:
        CheckpointError: nothing to read there, or (when asked for) a tensor that it does not have.
    """
    weights = open_weights(directory)
    return lambda name: read_tensor(weights, name, torch.float32)


def random_weights(arch: Architecture, seed: int) -> HFTensorReader:
    """Fresh weights drawn per Hugging Face tensor, so every layout starts from the same bits.

    Normal with `init_std`; projections back into the residual stream are scaled by 1/sqrt(2 x layers) (GPT-2).
    """
    shapes = hf_shapes(arch)
    rules = {name: mapping.rule for mapping in model_mappings(arch, 1) for name in mapping.hf}

    def read(name: str) -> torch.Tensor:
        if rules[name] is Rule.REPLICATED:  # a norm
            return torch.ones(shapes[name])
        if len(shapes[name]) == 1:  # a bias
            return torch.zeros(shapes[name])
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        std = arch.init_std
        if rules[name] is Rule.ROW:
            std /= (2 * arch.layers) ** 0.5
        return torch.randn(shapes[name], generator=generator) * std

    return read
