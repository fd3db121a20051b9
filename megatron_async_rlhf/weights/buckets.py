"""How a stream of tensors is packed into bounded buffers: the same plain-integer plan on both sides of a push."""

from collections.abc import Sequence

from msgspec import Struct


class TensorSpec(Struct, frozen=True, kw_only=True):
    """A whole Hugging Face tensor on the wire. `dtype` is torch's name without the prefix: `float32`."""

    name: str
    shape: list[int]
    dtype: str
    num_bytes: int


def plan_buckets(tensors: Sequence[TensorSpec], limit_bytes: int) -> list[list[TensorSpec]]:
    """Consecutive tensors grouped so that a bucket stays within the limit; a larger tensor is alone in its own."""
    buckets: list[list[TensorSpec]] = []
    filled = 0
    for tensor in tensors:
        if not buckets or filled + tensor.num_bytes > limit_bytes:
            buckets.append([])
            filled = 0
        buckets[-1].append(tensor)
        filled += tensor.num_bytes
    return buckets
