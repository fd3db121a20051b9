"""Digests of the slices of a push, made at both ends and compared by `proof`.

On CPUs they are xxh3-128. On GPUs, whose bytes reach the host at a hundredth of the speed of a push, they are made where the
weights are: two sums over the 32-bit words w of a slice, with 64-bit keys k that are odd and pseudo-random,

    piece:  s = Σ w[i] · k[i]  mod 2^64          slice:  d <- d · P + s  mod 2^64 for each piece; P odd

An odd factor maps no difference to zero, so one changed word always shows; of other changes 2^-64 go unseen if they are random
ones, which is as good as xxh3's promise. Neither is meant against forgery.
"""

from collections.abc import Sequence
from functools import cache

import numpy
import torch

from megatron_async_rlhf.formats.digest import digest
from megatron_async_rlhf.weights.plan import Slice

DIGEST_BYTES = 16

_PIECE_WORDS = 2**20  # each takes 24 bytes for a moment, which stay in a GPU's cache
_FACTOR = -7046029254386353131  # 0x9E3779B97F4A7C15, the golden ratio's odd neighbour, as a signed number


class SliceDigests:
    """Of one rank, during one push."""

    def __init__(self, dtype: torch.dtype) -> None:
        """`dtype`: that of the push, in which an end that keeps a wider one digests."""
        self._dtype = dtype
        self._made: dict[Slice, bytes | torch.Tensor] = {}

    def add(self, moved: Slice, values: torch.Tensor) -> None:
        """What the rank holds of a slice, [height, width]; on a GPU this only queues the work."""
        self._made[moved] = keyed_sums(values, self._dtype) if values.is_cuda else digest(values, self._dtype)

    def joined(self, order: Sequence[Slice]) -> bytes:
        """Of these slices, one behind the other."""
        made = [self._made[moved] for moved in order]
        sums = [each for each in made if isinstance(each, torch.Tensor)]
        if sums:  # all of them: a rank's parameters are on one device
            return torch.stack(sums).cpu().numpy().tobytes()
        return b"".join(each for each in made if isinstance(each, bytes))


def keyed_sums(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Of a matrix's elements in row-major order, as `dtype`: two int64, where the matrix is."""
    keys_2W = _keys(values.device)
    sums_2 = torch.zeros(2, dtype=torch.int64, device=values.device)
    rows = max(1, 4 * _PIECE_WORDS // max(1, values.shape[1] * dtype.itemsize))
    for block in values.detach().split(rows):
        flat = block.to(dtype).contiguous().view(-1)
        if flat.storage_offset() % 2:  # words have to begin at whole ones
            flat = flat.clone()
        words = flat.view(torch.int16 if flat.numel() * dtype.itemsize % 4 else torch.int32)
        for piece in words.split(_PIECE_WORDS):
            sums_2.mul_(_FACTOR).add_((piece.long() * keys_2W[:, : len(piece)]).sum(dim=1))
    return sums_2


@cache
def _keys(device: torch.device) -> torch.Tensor:
    """The same on every machine: numpy promises the numbers of this generator."""
    raw = numpy.random.Philox(key=0).random_raw(2 * _PIECE_WORDS) | 1
    return torch.from_numpy(raw.view(numpy.int64)).view(2, _PIECE_WORDS).to(device)
