"""Reads `.metadata`, a pickle, without running what a pickle can make Python run, and without Megatron."""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from megatron_async_rlhf.errors import CheckpointError

_DATA_MODULES = {"torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.planner"}
_DATA_CLASSES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("collections", "OrderedDict"),
}


class _Ignored:
    """Stands for everything that has no business here, such as the saving plans that Megatron keeps for itself."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


class _DataUnpickler(pickle.Unpickler):
    """Makes the classes of `torch.distributed.checkpoint` that are plain data, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _DATA_CLASSES or (module == "torch" and isinstance(vars(torch).get(name), torch.dtype)):
            return super().find_class(module, name)
        if module in _DATA_MODULES and "." not in name:
            found = super().find_class(module, name)
            if isinstance(found, type) and found.__module__ == module:
                return found
        return _Ignored


def read_metadata(path: Path) -> Metadata:
    """
    Raises:
        CheckpointError: the file is broken or holds something else.
    """
    try:
        with path.open("rb") as file:
            metadata = _DataUnpickler(file).load()
    except Exception as error:  # a broken pickle can raise anything
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}: {error})") from None
    if not isinstance(metadata, Metadata) or metadata.storage_data is None:
        raise CheckpointError(f"{path} does not describe a torch_dist checkpoint")
    return metadata
