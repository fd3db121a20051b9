"""The weights a value model starts from: the policy's body, and a head in place of the output matrix."""

from dataclasses import replace
from pathlib import Path

from megatron_async_rlhf.checkpoint.sources import open_weights
from megatron_async_rlhf.config.architecture import Architecture
from megatron_async_rlhf.errors import CheckpointError
from megatron_async_rlhf.weights.families import FAMILIES
from megatron_async_rlhf.weights.hf_mapping import hf_shapes
from megatron_async_rlhf.weights.stored import WeightReader, find_tensor

HF_HEAD = "score.weight"  # of Transformers' models for sequence classification, [1, H]


def value_body(arch: Architecture) -> Architecture:
    """The policy's, without an output matrix that an embedding could be tied to."""
    return replace(arch, tie_embeddings=False)


def open_value_source(directory: Path, arch: Architecture) -> WeightReader:
    """
    Raises:
        CheckpointError: no weights there, or one that is missing or has another shape than the value model's.
    """
    where = f"algorithm.value_hf = {directory}"
    try:
        reader = open_weights(directory)
        for name, shape in hf_shapes(value_body(arch)).items():
            if name in FAMILIES[arch.family].output.hf:
                continue
            if (found := find_tensor(reader, name).shape) != shape:
                raise CheckpointError(f"{name} has shape {found}, the policy's is {shape}")
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None
    head = reader.tensors.get(HF_HEAD)
    if head is not None and head.shape != (1, arch.hidden_size):
        raise CheckpointError(
            f"{where}: {HF_HEAD} has shape {head.shape}, a value model's is (1, {arch.hidden_size}); give a reward model "
            "with one label"
        )
    return reader
