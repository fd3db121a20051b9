"""What every rank holds of the model, in Hugging Face coordinates. Plain integers: no torch, nothing allocated.

A rank's parameters are rectangles of Hugging Face tensors put side by side. Megatron interleaves query, key and value by
key-value group and pads the vocabulary to a multiple of its ranks; vLLM keeps query, key and value apart, repeats
key-value heads when there are fewer than ranks, and pads the vocabulary to a multiple of 64. Once both sides are
written down as `Piece`s, moving weights is intersecting rectangles, and nobody needs to know the other's habits.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import assert_never

from megatron_async_rlhf.config.sections import LearnerSection
from megatron_async_rlhf.errors import MappingError
from megatron_async_rlhf.models.architecture import Architecture
from megatron_async_rlhf.models.families import Rule
from megatron_async_rlhf.models.hf_mapping import (
    PlacedMapping,
    copies_of_tied_embedding,
    hf_shapes,
    model_mappings,
)

VLLM_VOCAB_MULTIPLE = 64  # vllm.model_executor.layers.vocab_parallel_embedding.DEFAULT_VOCAB_PADDING_SIZE


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A rectangle of a Hugging Face tensor as it lies in one parameter of one rank. Vectors are one column wide.

    Attributes:
        rows, cols: half-open ranges in the Hugging Face tensor.
        parameter: name on the rank; on a learner with virtual stages `<chunk>:<name>`.
        row, col: where the rectangle begins in the parameter.
    """

    tensor: str
    rows: tuple[int, int]
    cols: tuple[int, int]
    parameter: str
    row: int = 0
    col: int = 0

    @property
    def size(self) -> int:
        """Number of elements."""
        return (self.rows[1] - self.rows[0]) * (self.cols[1] - self.cols[0])


@dataclass(frozen=True, kw_only=True)
class LearnerLayout:
    """How the learner's ranks divide the model, in Megatron's rank order: tensor, then context and data, then pipeline.

    Attributes:
        data_parallel: ranks that hold the same; context-parallel ranks are among them, as they only divide tokens.
    """

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    data_parallel: int = 1
    virtual_stages: int = 1

    @property
    def ranks(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel * self.data_parallel

    @classmethod
    def of(cls, learner: LearnerSection) -> "LearnerLayout":
        """The layout a configuration asks for."""
        return cls(
            tensor_parallel=learner.tensor_parallel,
            pipeline_parallel=learner.pipeline_parallel,
            data_parallel=learner.copies,
            virtual_stages=learner.virtual_stages,
        )

    def place(self, rank: int) -> tuple[int, int]:
        """Tensor-parallel rank and pipeline stage of a global rank."""
        return rank % self.tensor_parallel, rank // (self.tensor_parallel * self.data_parallel)

    def name_of(self, mapping: PlacedMapping) -> str:
        """What a rank calls the parameter: chunks of one rank may have parameters of the same name."""
        return f"{mapping.chunk}:{mapping.megatron}" if self.virtual_stages > 1 else mapping.megatron


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a Hugging Face tensor; a vector is one column."""
    return (shape[0], 1) if len(shape) == 1 else (shape[0], prod(shape[1:]))


def learner_pieces(arch: Architecture, layout: LearnerLayout, rank: int) -> list[Piece]:
    """Everything one Megatron rank holds, in model order.

    Raises:
        MappingError: a dimension the tensor-parallel ranks do not divide.
    """
    tensor_rank, stage = layout.place(rank)
    stages = layout.pipeline_parallel
    shapes = hf_shapes(arch)
    placed = (
        *model_mappings(arch, stages, layout.virtual_stages),
        *copies_of_tied_embedding(arch, stages, layout.virtual_stages),
    )
    return [
        piece
        for mapping in placed
        if mapping.stage == stage
        for piece in _megatron_parameter(mapping, shapes, arch, layout, tensor_rank)
    ]


def generator_pieces(arch: Architecture, tensor_parallel: int, rank: int) -> list[Piece]:
    """Everything one vLLM worker holds, in model order; padding of the vocabulary is not part of it.

    Raises:
        MappingError: a dimension the tensor-parallel ranks do not divide.
    """
    shapes = hf_shapes(arch)
    return [
        piece
        for mapping in model_mappings(arch, 1)
        for piece in _vllm_parameter(mapping, shapes, arch, tensor_parallel, rank)
    ]


def by_parameter(pieces: Iterable[Piece]) -> dict[str, list[Piece]]:
    """The pieces of each parameter, both in the order given."""
    found: dict[str, list[Piece]] = {}
    for piece in pieces:
        found.setdefault(piece.parameter, []).append(piece)
    return found


def parameter_shapes(pieces: Iterable[Piece]) -> dict[str, tuple[int, int]]:
    """Rows and columns each parameter needs to hold its pieces, without padding."""
    shapes: dict[str, tuple[int, int]] = {}
    for piece in pieces:
        rows, cols = shapes.get(piece.parameter, (0, 0))
        end = piece.row + piece.rows[1] - piece.rows[0], piece.col + piece.cols[1] - piece.cols[0]
        shapes[piece.parameter] = max(rows, end[0]), max(cols, end[1])
    return shapes


def _megatron_parameter(
    mapping: PlacedMapping, shapes: dict[str, tuple[int, ...]], arch: Architecture, layout: LearnerLayout, rank: int
) -> Iterator[Piece]:
    name = layout.name_of(mapping)
    sizes = [matrix_shape(shapes[tensor]) for tensor in mapping.hf]
    ranks = layout.tensor_parallel
    match mapping.rule:
        case Rule.QKV:
            blocks = _interleaved(mapping.hf, sizes, arch.kv_heads)
            share = _divide(sum(rows for rows, _ in sizes), ranks, mapping.hf[0])
            yield from _cut_rows(blocks, sizes[0][1], name, rank * share, (rank + 1) * share)
        case Rule.VOCAB:
            share = -(-sizes[0][0] // ranks)
            blocks = [(mapping.hf[0], 0, sizes[0][0])]
            yield from _cut_rows(blocks, sizes[0][1], name, rank * share, (rank + 1) * share)
        case Rule.REPLICATED | Rule.COLUMN | Rule.ROW | Rule.GATE_UP:
            yield from _parts(mapping, sizes, name, ranks, rank)
        case _:
            assert_never(mapping.rule)


def _vllm_parameter(
    mapping: PlacedMapping, shapes: dict[str, tuple[int, ...]], arch: Architecture, ranks: int, rank: int
) -> Iterator[Piece]:
    sizes = [matrix_shape(shapes[tensor]) for tensor in mapping.hf]
    match mapping.rule:
        case Rule.QKV:
            row = 0
            for tensor, (rows, cols), heads in zip(
                mapping.hf, sizes, (arch.heads, arch.kv_heads, arch.kv_heads), strict=True
            ):
                first, count = _heads_of(rank, ranks, heads, tensor)
                size = rows // heads
                begin, end = first * size, (first + count) * size
                yield Piece(tensor=tensor, rows=(begin, end), cols=(0, cols), parameter=mapping.vllm, row=row)
                row += end - begin
        case Rule.VOCAB:
            padded = -(-sizes[0][0] // VLLM_VOCAB_MULTIPLE) * VLLM_VOCAB_MULTIPLE
            share = _divide(padded, ranks, mapping.hf[0])
            blocks = [(mapping.hf[0], 0, sizes[0][0])]
            yield from _cut_rows(blocks, sizes[0][1], mapping.vllm, rank * share, (rank + 1) * share)
        case Rule.REPLICATED | Rule.COLUMN | Rule.ROW | Rule.GATE_UP:
            yield from _parts(mapping, sizes, mapping.vllm, ranks, rank)
        case _:
            assert_never(mapping.rule)


def _parts(mapping: PlacedMapping, sizes: list[tuple[int, int]], name: str, ranks: int, rank: int) -> Iterator[Piece]:
    """The rules both engines share: whole, divided by rows, by columns, or rows of one tensor then of the next."""
    row = 0
    for tensor, (rows, cols) in zip(mapping.hf, sizes, strict=True):
        row_range, col_range = (0, rows), (0, cols)
        if mapping.rule in (Rule.COLUMN, Rule.GATE_UP):
            share = _divide(rows, ranks, tensor)
            row_range = rank * share, (rank + 1) * share
        elif mapping.rule is Rule.ROW:
            share = _divide(cols, ranks, tensor)
            col_range = rank * share, (rank + 1) * share
        yield Piece(tensor=tensor, rows=row_range, cols=col_range, parameter=name, row=row)
        row += row_range[1] - row_range[0]


def _interleaved(tensors: Sequence[str], sizes: list[tuple[int, int]], groups: int) -> list[tuple[str, int, int]]:
    """Megatron's row order of query, key and value: (tensor, first row, rows) for each key-value group in turn."""
    return [
        (tensor, group * (rows // groups), rows // groups)
        for group in range(groups)
        for tensor, (rows, _) in zip(tensors, sizes, strict=True)
    ]


def _cut_rows(
    blocks: Iterable[tuple[str, int, int]], cols: int, parameter: str, begin: int, end: int
) -> Iterator[Piece]:
    """The pieces of rows [begin, end) of blocks stacked on each other."""
    top = 0
    for tensor, first, rows in blocks:
        low, high = max(begin, top), min(end, top + rows)
        if low < high:
            rows_of_tensor = first + low - top, first + high - top
            yield Piece(tensor=tensor, rows=rows_of_tensor, cols=(0, cols), parameter=parameter, row=low - begin)
        top += rows


def _heads_of(rank: int, ranks: int, heads: int, tensor: str) -> tuple[int, int]:
    """First head and number of heads on a vLLM rank; heads repeat when there are fewer than ranks."""
    if heads < ranks:
        return rank // _divide(ranks, heads, tensor), 1
    count = _divide(heads, ranks, tensor)
    return rank * count, count


def _divide(size: int, parts: int, tensor: str) -> int:
    if size % parts:
        raise MappingError(f"{tensor}: {size} cannot be divided by {parts} tensor-parallel ranks")
    return size // parts
