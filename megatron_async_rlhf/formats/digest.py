"""128-bit non-cryptographic digests of tensors: any flipped bit changes them, and hashing is as fast as memory."""

from collections.abc import Iterable

import torch
import xxhash

# What is not contiguous is copied in blocks: on the host they stay in the cache, from a GPU each is a transfer.
_BLOCK_BYTES = {"cpu": 128 * 2**10, "cuda": 32 * 2**20}


def digest(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> bytes:
    """xxh3-128 of the elements in row-major order, 16 bytes; name and shape are not part of it.

    Args:
        dtype: hash the elements as they are after conversion to this type.
    """
    tensor = tensor.detach()
    dtype = dtype or tensor.dtype
    if tensor.is_contiguous() and tensor.dtype == dtype:
        return xxhash.xxh3_128_digest(_bytes_of(tensor))
    block = _BLOCK_BYTES[tensor.device.type]
    rows = max(1, block * tensor.shape[0] // max(1, tensor.numel() * dtype.itemsize)) if tensor.ndim else 1
    return digest_blocks(block.to(dtype) for block in (tensor.split(rows) if tensor.ndim else (tensor,)))


def digest_blocks(blocks: Iterable[torch.Tensor]) -> bytes:
    """`digest` of consecutive blocks of rows put together, without putting them together."""
    hasher = xxhash.xxh3_128()
    for block in blocks:
        hasher.update(_bytes_of(block.contiguous()))
    return hasher.digest()


def _bytes_of(tensor: torch.Tensor):
    return tensor.view(-1).view(torch.uint8).cpu().numpy()
