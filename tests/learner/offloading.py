"""Lets Megatron offload Adam where there is no GPU: all that its code asks CUDA for, answered for two kinds of memory."""

from contextlib import nullcontext

import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer


class _Stream:
    def wait_stream(self, stream: "_Stream") -> None: ...

    def record_event(self) -> "_Event":
        return _Event()


class _Event:
    def synchronize(self) -> None: ...

    def wait(self, stream: _Stream) -> None: ...


def offload_without_a_gpu() -> None:
    """Of this process, for good. What was page-locked is the host's, everything else counts as a GPU's."""
    torch.cuda.current_stream = torch.cuda.Stream = lambda *_: _Stream()
    torch.cuda.stream = lambda _: nullcontext()
    empty, divide = torch.empty, HybridDeviceOptimizer._get_sub_optimizer_param_groups

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        tensor.is_locked = True
        return tensor

    def divide_by_kind(self: HybridDeviceOptimizer, fraction: float) -> tuple:
        torch.Tensor.is_cuda = property(lambda tensor: not hasattr(tensor, "is_locked"))
        try:
            return divide(self, fraction)
        finally:
            del torch.Tensor.is_cuda

    torch.Tensor.pin_memory = pin_memory
    torch.empty = lambda *sizes, pin_memory=False, **keys: empty(*sizes, **keys)
    HybridDeviceOptimizer._get_sub_optimizer_param_groups = divide_by_kind
