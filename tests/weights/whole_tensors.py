"""The reference for layouts, written on whole tensors: cuts Hugging Face tensors into a tensor-parallel rank's Megatron
parameter, and puts all ranks' parameters together again. `merge(rule, [split(...) for every rank])` is the identity.
"""

from collections.abc import Sequence

import torch

from megatron_async_rlhf.errors import MappingError
from megatron_async_rlhf.models.architecture import Architecture
from megatron_async_rlhf.models.families import Rule


def split(rule: Rule, tensors: Sequence[torch.Tensor], arch: Architecture, ranks: int, rank: int) -> torch.Tensor:
    """Rank `rank` of `ranks`'s parameter.

    Args:
        tensors: the Hugging Face tensors of the mapping, in its order, each whole.

    Raises:
        MappingError: a dimension that the ranks do not divide.
    """
    match rule:
        case Rule.REPLICATED:
            return tensors[0]
        case Rule.COLUMN:
            return _part(tensors[0], 0, ranks, rank)
        case Rule.ROW:
            return _part(tensors[0], 1, ranks, rank)
        case Rule.VOCAB:
            return _part(_pad_rows(tensors[0], ranks), 0, ranks, rank)
        case Rule.QKV:
            return _part(_interleave_qkv(*tensors, arch), 0, ranks, rank)
        case Rule.GATE_UP:
            return torch.cat([_part(tensor, 0, ranks, rank) for tensor in tensors])


def merge(rule: Rule, shards: Sequence[torch.Tensor], arch: Architecture) -> list[torch.Tensor]:
    """The whole Hugging Face tensors from every rank's parameter, in rank order."""
    match rule:
        case Rule.REPLICATED:
            return [shards[0]]
        case Rule.COLUMN:
            return [torch.cat(list(shards))]
        case Rule.ROW:
            return [torch.cat(list(shards), dim=1)]
        case Rule.VOCAB:
            return [torch.cat(list(shards))[: arch.vocab_size]]
        case Rule.QKV:
            return _separate_qkv(torch.cat(list(shards)), arch)
        case Rule.GATE_UP:
            halves = [shard.chunk(2) for shard in shards]
            return [torch.cat([half[0] for half in halves]), torch.cat([half[1] for half in halves])]


def _part(tensor: torch.Tensor, dim: int, ranks: int, rank: int) -> torch.Tensor:
    if tensor.shape[dim] % ranks:
        raise MappingError(
            f"dimension {dim} of a tensor of shape {tuple(tensor.shape)} is not divisible by {ranks} ranks"
        )
    return tensor.chunk(ranks, dim)[rank]


def _pad_rows(tensor: torch.Tensor, ranks: int) -> torch.Tensor:
    missing = -tensor.shape[0] % ranks
    return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])]) if missing else tensor


def _interleave_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, arch: Architecture) -> torch.Tensor:
    """[heads x d, h], [kv x d, h], [kv x d, h] -> [kv x (heads/kv + 2) x d, h], one block per key-value group.

    Biases are the same without the last dimension.
    """
    groups, rest = arch.kv_heads, q.shape[1:]
    parts = [tensor.reshape(groups, -1, *rest) for tensor in (q, k, v)]
    return torch.cat(parts, dim=1).reshape(-1, *rest)


def _separate_qkv(qkv: torch.Tensor, arch: Architecture) -> list[torch.Tensor]:
    groups, rest = arch.kv_heads, qkv.shape[1:]
    rows = [arch.heads // groups * arch.head_dim, arch.head_dim, arch.head_dim]
    parts = qkv.reshape(groups, sum(rows), *rest).split(rows, dim=1)
    return [part.reshape(-1, *rest) for part in parts]
