"""Plain values between the learner's ranks, as MessagePack of a fixed type: torch's own functions for objects pickle them.

Collective over the placement's `control` group. `kind` is anything that msgspec can decode.
"""

from typing import Any

import msgspec
import torch
import torch.distributed as dist


def of_all_ranks(value: Any, kind: Any, group: dist.ProcessGroup) -> list[Any]:
    """Every rank's value, by rank."""
    mine = _encoded(value)
    sizes = _sizes(mine, group)
    padded = [torch.empty(max(sizes), dtype=torch.uint8) for _ in sizes]
    dist.all_gather(padded, _padded(mine, max(sizes)), group=group)
    return [_decoded(raw[:size], kind) for raw, size in zip(padded, sizes, strict=True)]


def at_first_rank(value: Any, kind: Any, group: dist.ProcessGroup) -> list[Any]:
    """Every rank's value, by rank, on rank 0; an empty list on other ranks."""
    mine = _encoded(value)
    sizes = _sizes(mine, group)
    padded = [torch.empty(max(sizes), dtype=torch.uint8) for _ in sizes] if dist.get_rank(group) == 0 else None
    dist.gather(_padded(mine, max(sizes)), padded, group=group, group_dst=0)
    return [_decoded(raw[:size], kind) for raw, size in zip(padded or [], sizes, strict=bool(padded))]


def from_rank(source: int, value: Any, kind: Any, group: dist.ProcessGroup) -> Any:
    """The value that this rank has, on all ranks; what others give is not looked at."""
    mine = _encoded(value) if dist.get_rank(group) == source else torch.empty(0, dtype=torch.uint8)
    size = torch.tensor([len(mine)])
    dist.broadcast(size, group=group, group_src=source)
    raw = mine if len(mine) else torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(raw, group=group, group_src=source)
    return _decoded(raw, kind)


def _sizes(mine: torch.Tensor, group: dist.ProcessGroup) -> list[int]:
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, torch.tensor([len(mine)]), group=group)
    return [int(size) for size in sizes]


def _encoded(value: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(msgspec.msgpack.encode(value)), dtype=torch.uint8)


def _decoded(raw: torch.Tensor, kind: Any) -> Any:
    return msgspec.msgpack.decode(raw.numpy().tobytes(), type=kind)


def _padded(raw: torch.Tensor, size: int) -> torch.Tensor:
    return torch.nn.functional.pad(raw, (0, size - len(raw)))
