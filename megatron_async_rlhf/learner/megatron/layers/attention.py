"""Causal attention within each packed sequence, without Transformer Engine: torch's own kernels, on any device.

Takes what Transformer Engine's attention takes (`PackedSeqParams` in THD form), so a micro-batch looks the same to
the model everywhere. Scores are never materialised, and nothing is computed between sequences. A part of the row that continues
from a shared prompt attends to that too: its keys are copied in front of the part's own.
Shape legend: T tokens of all sequences, A attention heads, K key-value heads, D numbers of a head.
"""

from itertools import groupby

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType

from megatron_async_rlhf.learner.megatron.context import gather_over_context, parts_of_rank
from megatron_async_rlhf.learner.megatron.layers.packed_row import PackedRow


class PackedAttention(torch.nn.Module):
    """The core attention of a Megatron layer spec; has no parameters."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **unused: object,
    ) -> None:
        super().__init__()
        self._scale = softmax_scale

    def forward(
        self,
        query_TAD: torch.Tensor,
        key_TKD: torch.Tensor,
        value_TKD: torch.Tensor,
        attention_mask: None = None,
        *,
        packed_seq_params: PackedRow,
        **unused: object,
    ) -> torch.Tensor:
        """[T, A, D]; the mask is in `packed_seq_params`."""
        ends = packed_seq_params.cu_seqlens_q.tolist()
        if parallel_state.get_context_parallel_world_size() > 1:
            return self._attend_in_context(query_TAD, key_TKD, value_TKD, ends)
        lengths = lengths_kv = _lengths(ends)
        if packed_seq_params.keys_K is not None:
            key_TKD, value_TKD = (part.index_select(0, packed_seq_params.keys_K) for part in (key_TKD, value_TKD))
            lengths_kv = _lengths(packed_seq_params.cu_seqlens_kv.tolist())
        shapes = zip(lengths, lengths_kv, strict=True)
        # Neighbours of the same lengths are one batch: few kernels even for many short sequences.
        runs = [(shape, len(list(run))) for shape, run in groupby(shapes)]
        queries, keys = ([shape[i] * count for shape, count in runs] for i in (0, 1))
        attended = [
            self._attend(
                _batch(query, own), _batch(key, seen), _batch(value, seen), mask=_mask(own, seen, query.device)
            )
            for ((own, seen), _), query, key, value in zip(
                runs, query_TAD.split(queries), key_TKD.split(keys), value_TKD.split(keys), strict=True
            )
        ]
        return torch.cat([part.transpose(1, 2).flatten(0, 1) for part in attended])

    def _attend_in_context(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ends: list[int]):
        """This rank's queries with the keys of all context-parallel ranks up to each query's own position."""
        key, value = gather_over_context(key, ends), gather_over_context(value, ends)
        rank, ranks = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
        parts = parts_of_rank(ends, rank, ranks)
        attended = []
        for (start, first, last), part in zip(
            parts, query.split([last - first for _, first, last in parts]), strict=True
        ):
            keys, values = (_batch(whole[start:last], last - start) for whole in (key, value))
            mask = _mask(last - first, last - start, query.device)
            attended.append(self._attend(_batch(part, last - first), keys, values, mask=mask))
        return torch.cat([part.transpose(1, 2).flatten(0, 1) for part in attended])

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Causal attention, or where `mask` is True."""
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self._scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )


def _lengths(ends: list[int]) -> list[int]:
    return [end - start for start, end in zip(ends, ends[1:], strict=False)]


def _mask(own: int, seen: int, device: torch.device) -> torch.Tensor | None:
    """True where the last `own` of `seen` positions may look: at themselves and before; None if these are all."""
    if own == seen:
        return None
    return torch.ones(own, seen, dtype=torch.bool, device=device).tril(seen - own)


def _batch(sequences: torch.Tensor, length: int) -> torch.Tensor:
    """[sequences x length, heads, D] as [sequences, heads, length, D], a view."""
    return sequences.unflatten(0, (-1, length)).transpose(1, 2)
