"""A model's weights as Hugging Face files, written by rank 0."""

from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_async_rlhf.errors import WriteError
from megatron_async_rlhf.formats.hf_files import write_safetensors
from megatron_async_rlhf.formats.stored import TensorSpec
from megatron_async_rlhf.learner.megatron.parallel import Placement
from megatron_async_rlhf.learner.megatron.plain_values import from_rank
from megatron_async_rlhf.models.architecture import Architecture
from megatron_async_rlhf.models.hf_mapping import hf_shapes
from megatron_async_rlhf.telemetry.files import unwritten


def write_gathered(
    directory: Path, stream: Iterator[tuple[str, torch.Tensor]], arch: Architecture, dtype: str, placement: Placement
) -> None:
    """Write safetensors shards and their index from rank 0; the other ranks send their parts. Collective.

    Args:
        stream: what `weights.gather_weights` gives.
        dtype: of the weights.

    Raises:
        WriteError: the same on every rank.
    """
    failed: str | None = None
    if placement.rank == 0:
        specs = [TensorSpec(name, shape, dtype) for name, shape in hf_shapes(arch).items()]
        try:
            write_safetensors(directory, specs, stream)
        except OSError as error:
            failed = unwritten(directory, error)
    for _ in stream:
        pass  # the other ranks send what they have, whatever becomes of the files
    if failed := from_rank(0, failed, str | None, placement.control):
        raise WriteError(failed)
