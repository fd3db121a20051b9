"""A stored tensor without its values. No torch."""

from dataclasses import dataclass
from math import prod

from megatron_async_rlhf.models.layout import matrix_shape

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A Hugging Face tensor without its values. `dtype` is torch's name without the prefix: `float32`."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns; a vector is one column wide."""
        return matrix_shape(self.shape) if self.shape else (1, 1)
