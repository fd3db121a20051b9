"""128-bit non-cryptographic digests of tensors: any flipped bit changes them, and hashing is as fast as memory."""

from collections.abc import Iterable

import torch
import xxhash


def digest(tensor: torch.Tensor) -> bytes:
    """xxh3-128 of the tensor's elements in row-major order, 16 bytes; name, shape and dtype are not part of it."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    return xxhash.xxh3_128_digest(flat.cpu().numpy())


def differing(names: list[str], ours: bytes, theirs: bytes) -> list[str]:
    """Names whose 16-byte digests differ between two concatenations in the order of `names`."""
    return [name for i, name in enumerate(names) if ours[16 * i : 16 * i + 16] != theirs[16 * i : 16 * i + 16]]


def digest_blocks(blocks: Iterable[torch.Tensor]) -> bytes:
    """`digest` of consecutive blocks of rows put together, without putting them together."""
    state = xxhash.xxh3_128()
    for block in blocks:
        state.update(block.contiguous().view(-1).view(torch.uint8).numpy())
    return state.digest()
