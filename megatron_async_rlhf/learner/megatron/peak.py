"""What the learner's devices could do, to which its speed is compared."""

import torch

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.devices import known_peak


def peak_flops(config: RunConfig) -> float | None:
    """What all ranks' devices could do in a second, if that is known."""
    learner = config.learner
    peak = None if learner.peak_tflops is None else learner.peak_tflops * 1e12
    if peak is None and config.run.device == "cuda":
        peak = known_peak(torch.cuda.get_device_name(), "fp8" if learner.fp8 else learner.precision)
    return None if peak is None else peak * learner.world_size
