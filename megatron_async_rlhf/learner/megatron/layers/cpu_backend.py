"""Makes megatron-core run on a CPU over gloo: the only place that knows megatron-core was written for CUDA.

megatron-core 0.16 to 0.19 names the device `cuda` in about a hundred places. Three things turn them into the
CPU without changing megatron's source: a `TorchFunctionMode` that rewrites `device="cuda"` in every torch call,
`torch.cuda` queries that answer for the CPU, and megatron's own inference RNG tracker, whose fork is a no-op
(weights are initialised on the CPU and dropout is 0, so no CUDA generator is ever needed). Recomputation needs
more, see `_enable_recomputation`. Where megatron looks for a fused kernel of Transformer Engine to rotate packed
sequences, it finds ours.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron_async_rlhf.learner.megatron.layers.rotary import rotate_packed

_CPU = torch.device("cpu")


class _CudaMeansCpu(TorchFunctionMode):
    """Sends tensors that megatron asks for on CUDA to the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if kwargs and _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": _CPU}
        if func is torch.Tensor.to and any(_is_cuda(arg) for arg in args[1:]):
            args = (args[0], *(_CPU if _is_cuda(arg) else arg for arg in args[1:]))
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.type and isinstance(result, str):
            # The optimizer tells parameter kinds apart by `torch.cuda.FloatTensor` and the like.
            return result.replace("torch.", "torch.cuda.", 1)
        return result


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


def enable_cpu_backend() -> None:
    """Call once per process, before any megatron model is built."""
    torch.cuda.current_device = lambda: _CPU
    torch.cuda.synchronize = lambda device=None: None
    _CudaMeansCpu().__enter__()  # for the life of the process
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.tensor_parallel import random

    rope_utils.fused_apply_rotary_pos_emb_thd = rotate_packed
    random.initialize_rng_tracker(inference_rng_tracker=True)
    _enable_recomputation(random)


def _enable_recomputation(random: Any) -> None:
    """Let `megatron.core.tensor_parallel.random` run a layer's forward pass again inside backward."""
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.empty(0)
    # Megatron's own would not fail without CUDA: torch queues it, with a stack trace, for the day CUDA starts.
    random._set_cuda_rng_state = lambda *args, **kwargs: None
    fork_rng = random._fork_rng

    @contextmanager
    def fork_rng_on_cpu() -> Iterator[None]:
        # Autograd calls backward outside all function modes.
        with fork_rng(), _CudaMeansCpu():
            yield

    random._fork_rng = fork_rng_on_cpu
