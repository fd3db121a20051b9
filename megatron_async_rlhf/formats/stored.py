"""Tensors that lie row by row in files, read a rectangle at a time.

Files are read with `pread` into memory of ours, never mapped: the pages of a mapped file count as memory of the
process that touches them, so a reader that maps a model cannot promise a bound.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from megatron_async_rlhf.errors import CheckpointError
from megatron_async_rlhf.formats.tensor_spec import TensorSpec

STAGING_BYTES = 4 * 2**20  # what reading or hashing a tensor of any size holds of it at a time
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class WeightReader(Protocol):
    """A model's Hugging Face tensors, whatever files hold them.

    Attributes:
        label: what messages call it.
        tensors: shape and dtype by name, in the order of the model.
    """

    label: str

    @property
    def tensors(self) -> Mapping[str, TensorSpec]: ...

    def read_into(self, target: torch.Tensor, name: str, row: int, col: int) -> None:
        """Fill `target` [r, c] with the rectangle that begins at (row, col), rounding to its dtype where they differ.

        A vector is one column wide.

        Raises:
            CheckpointError: there is no such tensor, or its file cannot be read.
        """


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in one piece of a file. `rows` x `cols` elements begin at byte `offset`."""

    path: Path
    offset: int
    rows: int
    cols: int
    dtype: torch.dtype

    def read_into(self, target: torch.Tensor, row: int, col: int) -> None:
        """As `WeightReader.read_into`."""
        rows, cols = target.shape
        row_bytes = self.cols * self.dtype.itemsize
        if cols == self.cols and target.dtype == self.dtype and target.is_contiguous():
            self._read(target, self.offset + row * row_bytes)
            return
        step = max(1, STAGING_BYTES // max(row_bytes, 1))
        buffer = torch.empty(min(step, rows), self.cols, dtype=self.dtype)
        for first in range(0, rows, step):
            block = buffer[: min(step, rows - first)]
            self._read(block, self.offset + (row + first) * row_bytes)
            target[first : first + len(block)].copy_(block[:, col : col + cols])

    def _read(self, target: torch.Tensor, offset: int) -> None:
        rest = memoryview(target.view(-1).view(torch.uint8).numpy())
        try:
            file = os.open(self.path, os.O_RDONLY)
            try:
                while rest:
                    count = os.preadv(file, [rest], offset)
                    if not count:
                        raise CheckpointError(f"{self.path} ends at byte {offset}, before its tensors do")
                    rest, offset = rest[count:], offset + count
            finally:
                os.close(file)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read ({error.strerror or error})") from None


def find_tensor(reader: WeightReader, name: str) -> TensorSpec:
    """
    Raises:
        CheckpointError: the reader has no such tensor.
    """
    try:
        return reader.tensors[name]
    except KeyError:
        raise CheckpointError(f"{reader.label} has no tensor {name}") from None


def read_blocks(
    reader: WeightReader, name: str, rows: tuple[int, int], cols: tuple[int, int], dtype: torch.dtype
) -> Iterator[torch.Tensor]:
    """A rectangle as consecutive blocks of its rows, each valid until the next is asked for."""
    width = cols[1] - cols[0]
    step = max(1, STAGING_BYTES // max(width * dtype.itemsize, 1))
    buffer = torch.empty(min(step, rows[1] - rows[0]), width, dtype=dtype)
    for first in range(rows[0], rows[1], step):
        block = buffer[: min(step, rows[1] - first)]
        reader.read_into(block, name, first, cols[0])
        yield block
