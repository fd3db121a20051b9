"""Process groups of one learner rank: Megatron's own, and a gloo group for commands and results."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_async_rlhf.config.sections import LearnerSection
from megatron_async_rlhf.learner.megatron.cpu_backend import enable_cpu_backend
from megatron_async_rlhf.weights.layout import LearnerLayout


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where this rank sits in the learner.

    Attributes:
        sequence_parallel: between layers a tensor-parallel rank keeps its share of the tokens only.
        control: gloo group of all ranks, in rank order; carries commands and small results on any device.
    """

    rank: int
    tensor_rank: int
    tensor_parallel: int
    pipeline_rank: int
    pipeline_parallel: int
    data_rank: int
    data_parallel: int
    sequence_parallel: bool
    control: dist.ProcessGroup

    @property
    def layout(self) -> LearnerLayout:
        """The whole learner's, as the weight planner sees it."""
        return LearnerLayout(
            tensor_parallel=self.tensor_parallel,
            pipeline_parallel=self.pipeline_parallel,
            data_parallel=self.data_parallel,
        )

    @property
    def width_multiple(self) -> int:
        """What a micro-batch's tokens per row must be a multiple of, so that ranks can divide them."""
        return self.tensor_parallel if self.sequence_parallel else 1

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline_parallel - 1

    @property
    def reports_loss(self) -> bool:
        """True on the one rank per data-parallel replica whose loss sums are counted."""
        return self.is_last_stage and self.tensor_rank == 0


def join_learner(config: LearnerSection) -> Placement:
    """Join the learner's process groups; reads the environment `torchrun` sets (RANK, WORLD_SIZE, MASTER_*)."""
    enable_cpu_backend()
    torch.set_num_threads(config.threads)
    timeout = timedelta(seconds=config.timeout_s)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=timeout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_parallel,
        pipeline_model_parallel_size=config.pipeline_parallel,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=max(1, round(config.timeout_s / 60)),
    )
    return Placement(
        rank=rank,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_parallel=config.tensor_parallel,
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_parallel=config.pipeline_parallel,
        data_rank=parallel_state.get_data_parallel_rank(),
        data_parallel=parallel_state.get_data_parallel_world_size(),
        sequence_parallel=config.sequence_parallel,
        control=dist.new_group(backend="gloo", timeout=timeout),
    )
