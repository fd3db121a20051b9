"""A trained model's chunks under Megatron's DistributedDataParallel, which owns the gradient buffers.

With `overlap_param_gather` a rank's parameters are whole only during the forward pass that gathers them; whoever
reads them at another time asks for it with `gather_parameters`.
"""

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel

from megatron_async_rlhf.config.sections import LearnerSection
from megatron_async_rlhf.learner.meter import Meter


class ReplicatedChunks:
    """This rank's chunks, wrapped.

    Attributes:
        chunks: one wrapper per virtual stage, in order.
    """

    def __init__(self, chunks: list[GPTModel], learner: LearnerSection, meter: Meter) -> None:
        self._meter = meter
        config = chunks[0].config
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=learner.overlap_grad_reduce,
            overlap_param_gather=learner.overlap_param_gather,
            use_distributed_optimizer=learner.distributed_optimizer,
        )
        self.chunks = [
            # Buckets serve overlap; later chunks run first in backward and have nothing to overlap with.
            DistributedDataParallel(config, ddp, chunk, disable_bucketing=number > 0)
            for number, chunk in enumerate(chunks)
        ]
        config.finalize_model_grads_func = self._reduce_gradients
        if learner.overlap_grad_reduce:
            no_sync = [chunk.no_sync for chunk in self.chunks]
            config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        self._gathers_late = learner.overlap_param_gather
        self._is_gathered = True

    def begin_step(self) -> None:
        """Clear the gradients. The forward pass that follows gathers the parameters."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self._is_gathered = True

    def parameters_changed(self) -> None:
        """The optimizer has made a step."""
        self._is_gathered = not self._gathers_late

    @torch.no_grad()
    def gather_parameters(self) -> None:
        """Make this rank's parameters whole, if they are not. Collective over the data-parallel ranks."""
        if not self._is_gathered:
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)
        self._is_gathered = True

    def _reduce_gradients(self, *arguments: Any, **named: Any) -> None:
        """Called by the schedule after the last backward pass."""
        with self._meter.span("gradient reduction"):
            finalize_model_grads(*arguments, **named)
