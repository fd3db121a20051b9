"""Where the parts of a row lie, in the form that Megatron hands to its layers.

A part is a sequence, a piece of one, or padding. Attention stays within a part and, where a part continues from another one,
within the two together. Shape legend: T positions of the row that this rank computes, K keys of all parts together.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from itertools import accumulate

import torch
from megatron.core.packed_seq_params import PackedSeqParams


@dataclass
class PackedRow(PackedSeqParams):
    """
    Megatron's layers hand `cu_seqlens_q_padded` and `cu_seqlens_kv_padded`, where they are given, to the rotation instead of
    the ends, and nothing else of them reads those. On a CPU they are `places_T`: see `rotary`.

    Attributes:
        keys_K: positions in the row of the keys that each part attends to, one part after the other; None if those are its own
            positions.
    """

    keys_K: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        ends: Sequence[int],
        before: Sequence[tuple[int, int] | None] = (),
        places_T: torch.Tensor | None = None,
    ) -> "PackedRow":
        """
        Args:
            ends: where each part ends, with a 0 before.
            before: where the part lies that each of the first parts continues from; None if it begins a sequence.
            places_T: each position's place in its sequence; only needed on a CPU.
        """
        ends_q = ends_kv = torch.tensor(ends, dtype=torch.int32)
        own = list(zip(ends, ends[1:], strict=False))
        earlier = [*before, *[None] * (len(own) - len(before))]
        lengths = [end - start for start, end in own]
        keys_K = None
        if any(earlier):
            lengths = [
                length + (span[1] - span[0] if span else 0) for length, span in zip(lengths, earlier, strict=True)
            ]
            ends_kv = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
            spans = [span for pair in zip(earlier, own, strict=True) for span in pair if span]
            keys_K = torch.cat([torch.arange(*span) for span in spans])
        return cls(
            qkv_format="thd",
            cu_seqlens_q=ends_q,
            cu_seqlens_kv=ends_kv,
            cu_seqlens_q_padded=places_T,
            cu_seqlens_kv_padded=places_T,
            max_seqlen_q=max(lengths),
            max_seqlen_kv=max(lengths),
            keys_K=keys_K,
        )

    def to(self, device: torch.device) -> "PackedRow":
        """The same on a device."""
        moved = copy(self)
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(moved, name, value.to(device, non_blocking=True))
        return moved
