"""The weights a value model starts from: the policy's body, and a head in place of the output matrix."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_async_rlhf.errors import CheckpointError
from megatron_async_rlhf.formats.directory import is_checkpoint
from megatron_async_rlhf.formats.safetensors_files import find_weights
from megatron_async_rlhf.formats.tensor_spec import TensorSpec
from megatron_async_rlhf.installed import check_installed
from megatron_async_rlhf.models.architecture import Architecture
from megatron_async_rlhf.models.families import FAMILIES
from megatron_async_rlhf.models.hf_mapping import hf_shapes

if TYPE_CHECKING:
    from megatron_async_rlhf.formats.stored import WeightReader


def check_value_source(directory: Path, arch: Architecture) -> None:
    """As `open_value_source`, and without torch unless the weights are a checkpoint's.

    Raises:
        CheckpointError: no weights there, or one that is missing or has another shape than the value model's.
    """
    if is_checkpoint(directory):
        check_installed("torch")
        open_value_source(directory, arch)
        return
    try:
        tensors = {name: place.spec for name, place in find_weights(directory).items()}
    except CheckpointError as error:
        raise CheckpointError(f"algorithm.value_hf = {directory}: {error}") from None
    _check_tensors(directory, tensors, arch)


def open_value_source(directory: Path, arch: Architecture) -> "WeightReader":
    """
    Raises:
        CheckpointError: no weights there, or one that is missing or has another shape than the value model's.
    """
    from megatron_async_rlhf.formats.open_weights import open_weights  # brings torch

    try:
        reader = open_weights(directory)
    except CheckpointError as error:
        raise CheckpointError(f"algorithm.value_hf = {directory}: {error}") from None
    _check_tensors(directory, reader.tensors, arch)
    return reader


def _check_tensors(directory: Path, tensors: Mapping[str, TensorSpec], arch: Architecture) -> None:
    where = f"algorithm.value_hf = {directory}"
    (head_name,) = FAMILIES[arch.family].score.hf
    for name, shape in hf_shapes(arch.with_score_head()).items():
        if name == head_name:
            continue  # it may be missing
        if name not in tensors:
            raise CheckpointError(f"{where}: {directory} has no tensor {name}")
        if tensors[name].shape != shape:
            raise CheckpointError(f"{where}: {name} has shape {tensors[name].shape}, the policy's is {shape}")
    head = tensors.get(head_name)
    if head is not None and head.shape != (1, arch.hidden_size):
        raise CheckpointError(
            f"{where}: {head_name} has shape {head.shape}, a value model's is (1, {arch.hidden_size}); give a reward model "
            "with one label"
        )
