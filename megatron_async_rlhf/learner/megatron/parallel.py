"""Device and process groups of one learner rank: Megatron's own, and a gloo group for commands and results."""

import os
from dataclasses import dataclass
from datetime import timedelta
from math import lcm

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_async_rlhf.config.sections import Device, LearnerSection
from megatron_async_rlhf.learner.megatron.layers.cpu_backend import enable_cpu_backend
from megatron_async_rlhf.learner.megatron.layers.fp8 import TOKEN_MULTIPLE
from megatron_async_rlhf.models.layout import LearnerLayout
from megatron_async_rlhf.weights.transports.rendezvous import host_store, join_store


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where this rank sits in the learner.

    Attributes:
        virtual_stages: chunks of layers this rank has; chunk c of pipeline rank p is stage c x pipeline_parallel + p.
        context_rank, context_parallel: of the ranks that divide each sequence.
        sequence_parallel: between layers a tensor-parallel rank keeps its share of the tokens only.
        tile: what the tokens of a rank must be a multiple of for its matrix products.
        control: gloo group of all ranks, in rank order; carries commands and small results on any device.
    """

    rank: int
    tensor_rank: int
    tensor_parallel: int
    pipeline_rank: int
    pipeline_parallel: int
    virtual_stages: int = 1
    data_rank: int
    data_parallel: int
    context_rank: int = 0
    context_parallel: int = 1
    sequence_parallel: bool
    tile: int = 1
    device: torch.device
    control: dist.ProcessGroup

    @property
    def layout(self) -> LearnerLayout:
        """The whole learner's, as the weight planner sees it."""
        return LearnerLayout(
            tensor_parallel=self.tensor_parallel,
            pipeline_parallel=self.pipeline_parallel,
            data_parallel=self.data_parallel * self.context_parallel,
            virtual_stages=self.virtual_stages,
        )

    def synchronize(self) -> None:
        """Wait for the work queued on the device's current stream; a push has a stream of its own."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    @property
    def sequence_multiple(self) -> int:
        """What a sequence's positions must be a multiple of: each rank takes one part from its front, one from its end."""
        return 2 * self.context_parallel if self.context_parallel > 1 else 1

    @property
    def width_multiple(self) -> int:
        """What a micro-batch's positions must be a multiple of, so that ranks can divide them."""
        shares = self.context_parallel * (self.tensor_parallel if self.sequence_parallel else 1)
        return lcm(self.sequence_multiple, shares * self.tile)

    @property
    def batch_multiple(self) -> int:
        """What the number of micro-batches must be a multiple of: the interleaved schedule takes them in groups."""
        return self.pipeline_parallel if self.virtual_stages > 1 else 1

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline_parallel - 1

    @property
    def has_embedding(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def reports_loss(self) -> bool:
        """True on the one rank per data-parallel replica whose loss sums are counted."""
        return self.is_last_stage and self.tensor_rank == 0 and self.context_rank == 0


def join_learner(config: LearnerSection, device: Device) -> Placement:
    """Join the learner's process groups; reads the environment `torchrun` sets (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_*)."""
    # With `launch.cores: shared` a rank has more of them than the configuration says.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", config.threads)))
    timeout = timedelta(seconds=config.timeout_s)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if device == "cpu":
        enable_cpu_backend()
        where, backend = torch.device("cpu"), "gloo"
    else:
        where, backend = torch.device("cuda", int(os.environ["LOCAL_RANK"])), "nccl"
        torch.cuda.set_device(where)
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = (join_store if rank else host_store)(host, port, config.timeout_s)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_parallel,
        pipeline_model_parallel_size=config.pipeline_parallel,
        virtual_pipeline_model_parallel_size=config.virtual_stages if config.virtual_stages > 1 else None,
        context_parallel_size=config.context_parallel,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=max(1, round(config.timeout_s / 60)),
    )
    if device == "cuda":
        model_parallel_cuda_manual_seed(0)  # nothing is drawn: weights are read and dropout is off
    return Placement(
        rank=rank,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_parallel=config.tensor_parallel,
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_parallel=config.pipeline_parallel,
        virtual_stages=config.virtual_stages,
        data_rank=parallel_state.get_data_parallel_rank(),
        data_parallel=parallel_state.get_data_parallel_world_size(),
        context_rank=parallel_state.get_context_parallel_rank(),
        context_parallel=config.context_parallel,
        sequence_parallel=config.sequence_parallel,
        tile=TOKEN_MULTIPLE[config.fp8.recipe] if config.fp8 else 1,
        device=where,
        control=dist.new_group(backend="gloo", timeout=timeout),
    )
