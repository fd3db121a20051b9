"""Whether a run can continue from a checkpoint, found out before any process starts: all is there and as it was written."""

from pathlib import Path

import torch

from megatron_async_rlhf.checkpoint.run_state import read_run_state
from megatron_async_rlhf.errors import CheckpointError
from megatron_async_rlhf.formats.directory import COMMON
from megatron_async_rlhf.formats.file_digests import check_digests
from megatron_async_rlhf.formats.reader import TorchDistReader


def check_run_checkpoint(checkpoint: Path) -> None:
    """
    Raises:
        CheckpointError: one line naming the file that is missing or broken.
    """
    check_digests(checkpoint)
    state = read_run_state(checkpoint)
    TorchDistReader(checkpoint)
    path = checkpoint / COMMON
    try:
        version = torch.load(path, weights_only=True)["common"]["version"]
    except Exception as error:  # a broken archive can raise anything
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__})") from None
    if version != state.controller.version:
        raise CheckpointError(f"{path} is of version {version}, the controller's state of {state.controller.version}")


def check_reference(reference: Path) -> None:
    """
    Raises:
        CheckpointError: one line naming the file that is missing or broken.
    """
    check_digests(reference)
    TorchDistReader(reference)
