"""How many numbers each stage of the learner, and each generator worker, holds: from the layouts, nothing else."""

from dataclasses import dataclass, replace
from functools import cache
from math import prod

from megatron_async_rlhf.models.architecture import Architecture
from megatron_async_rlhf.models.layout import (
    VLLM_VOCAB_MULTIPLE,
    LearnerLayout,
    Piece,
    generator_pieces,
    learner_pieces,
    parameter_shapes,
)


@dataclass(frozen=True, kw_only=True)
class Holding:
    """Numbers of the parameters of one rank, padding of the vocabulary included.

    Attributes:
        total: of all parameters.
        largest: of the largest parameter.
        vocabulary: rows of its share of the embedding or output matrix.
    """

    total: int
    largest: int
    vocabulary: int


def learner_holdings(arch: Architecture, layout: LearnerLayout) -> list[Holding]:
    """Of tensor-parallel rank 0 of each pipeline stage, which holds as much as any of its stage."""
    return list(_stage_holdings(arch, replace(layout, data_parallel=1)))  # copies hold the same


@cache  # a planner asks for the same ones hundreds of times
def _stage_holdings(arch: Architecture, layout: LearnerLayout) -> tuple[Holding, ...]:
    vocabulary = -(-arch.vocab_size // layout.tensor_parallel)
    return tuple(
        _holding(learner_pieces(arch, layout, stage * layout.tensor_parallel), vocabulary)
        for stage in range(layout.pipeline_parallel)
    )


def value_holdings(arch: Architecture, layout: LearnerLayout) -> list[Holding]:
    """As `learner_holdings`, of a value model: the last stage has one row in place of the output matrix."""
    return learner_holdings(arch.with_score_head(), layout)


@cache
def generator_holding(arch: Architecture, tensor_parallel: int) -> Holding:
    """Of worker 0 of a replica, which holds as much as any; vLLM pads the vocabulary."""
    padded = -(-arch.vocab_size // VLLM_VOCAB_MULTIPLE) * VLLM_VOCAB_MULTIPLE
    return _holding(generator_pieces(arch, tensor_parallel, 0), padded // tensor_parallel)


def _holding(pieces: list[Piece], vocabulary: int) -> Holding:
    sizes = [prod(shape) for shape in parameter_shapes(pieces).values()]
    return Holding(total=sum(sizes), largest=max(sizes), vocabulary=vocabulary)
