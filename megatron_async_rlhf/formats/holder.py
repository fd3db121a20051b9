"""A model's weights as something that digests rectangles of them, wherever it holds them.

A holder that reads files can digest any rectangle. One that is far away, such as the workers of a generator, offers
digests of the rectangles it has, and the other side follows.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from megatron_async_rlhf.formats.digest import digest_blocks
from megatron_async_rlhf.formats.stored import DTYPES, TensorSpec, WeightReader, read_blocks


class Box(NamedTuple):
    """A rectangle of a tensor, half-open ranges; a vector is one column wide. `where` says whose, in messages."""

    tensor: str
    rows: tuple[int, int]
    cols: tuple[int, int]
    where: str = ""

    @property
    def size(self) -> int:
        """Number of elements."""
        return (self.rows[1] - self.rows[0]) * (self.cols[1] - self.cols[0])

    def __str__(self) -> str:
        place = f"{self.tensor}: {_span('row', self.rows)}, {_span('column', self.cols)}"
        return f"{place} on {self.where}" if self.where else place


class WeightHolder(Protocol):
    """Something that has a model's Hugging Face tensors, whole or in pieces.

    Attributes:
        label: what messages call it.
        tensors: shape and dtype by name, in the order of the model.
        boxes: the only rectangles it can digest, together all it has; None if it can digest any.
        exact: False if it digests values with zeros made positive, as a generator does that keeps matrices packed.
    """

    label: str
    exact: bool

    @property
    def tensors(self) -> Mapping[str, TensorSpec]: ...

    @property
    def boxes(self) -> Sequence[Box] | None: ...

    def digest(self, box: Box, dtype: str, *, exact: bool) -> bytes:
        """xxh3-128 of the rectangle's elements in row-major order, as `dtype`; of `x + 0.0` unless `exact`."""


class StoredWeights:
    """Weights in files as a `WeightHolder`."""

    boxes = None
    exact = True

    def __init__(self, reader: WeightReader) -> None:
        self.label, self.tensors, self._reader = reader.label, reader.tensors, reader

    def digest(self, box: Box, dtype: str, *, exact: bool) -> bytes:
        """As `WeightHolder.digest`."""
        blocks = read_blocks(self._reader, box.tensor, box.rows, box.cols, DTYPES[dtype])
        return digest_blocks(blocks if exact else (block + 0.0 for block in blocks))


def _span(what: str, extent: tuple[int, int]) -> str:
    begin, end = extent
    return f"{what} {begin}" if end - begin == 1 else f"{what}s {begin} to {end - 1}"
