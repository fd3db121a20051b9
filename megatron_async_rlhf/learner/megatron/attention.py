"""Causal attention within each packed sequence, without Transformer Engine: torch's own kernels, on any device.

Takes what Transformer Engine's attention takes (`PackedSeqParams` in THD form), so a micro-batch looks the same to
the model everywhere. Scores are never materialised, and nothing is computed between sequences.
Shape legend: T tokens of all sequences, A attention heads, K key-value heads, D numbers of a head.
"""

from itertools import groupby

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType


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
        packed_seq_params: PackedSeqParams,
        **unused: object,
    ) -> torch.Tensor:
        """[T, A, D]; the mask is in `packed_seq_params`."""
        ends = packed_seq_params.cu_seqlens_q.tolist()
        lengths = [end - start for start, end in zip(ends, ends[1:], strict=False)]
        # Neighbours of the same length are one batch: few kernels even for many short sequences.
        runs = [(length, len(list(run))) for length, run in groupby(lengths)]
        tokens = [length * count for length, count in runs]
        attended = [
            F.scaled_dot_product_attention(
                *(_batch(part, length) for part in parts),
                is_causal=True,
                scale=self._scale,
                enable_gqa=query_TAD.shape[1] != key_TKD.shape[1],
            )
            for (length, _), *parts in zip(
                runs, query_TAD.split(tokens), key_TKD.split(tokens), value_TKD.split(tokens), strict=True
            )
        ]
        return torch.cat([part.transpose(1, 2).flatten(0, 1) for part in attended])


def _batch(sequences: torch.Tensor, length: int) -> torch.Tensor:
    """[sequences x length, heads, D] as [sequences, heads, length, D], a view."""
    return sequences.unflatten(0, (-1, length)).transpose(1, 2)
