"""What data-parallel ranks keep of Adam's state between them: whole parameters for a checkpoint, and back from one.

    save:  every rank's share of a bucket -> one flat buffer on the first rank, which writes -> the bucket's parameters
    load:  each rank asks for the parameters it keeps a part of, whole -> copies its part

The entries are those of an undivided optimizer, so that either kind reads what the other wrote. Megatron has a form
with the same entries, `fully_reshardable`. But in 0.16 it drops the padding behind each bucket of a gradient buffer
and then looks parameters up by places that count it: all behind the first padded bucket is saved moved. And it gathers
the state on every rank, and asks for all of it on every rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor, is_main_replica
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_async_rlhf.learner.megatron.state.host_copy import on_host

_MOMENTS = ("exp_avg", "exp_avg_sq")
_MAIN_PARAMETER = "fp32_param"  # as an undivided optimizer calls it
_GATHERED_AT_ONCE = 2**24  # numbers, on the device of the rank that writes

Entries = dict[str, dict[int, Any]]  # `exp_avg` and so on -> number of a parameter -> what is saved or loaded of it


@dataclass(frozen=True, kw_only=True)
class _Part:
    """What this rank keeps of a parameter: numbers `start` to `end` of it, `place` on in the rank's share."""

    start: int
    end: int
    place: int


@dataclass(frozen=True, kw_only=True)
class _Bucket:
    """A stretch of a gradient buffer, of which each rank keeps an equal share, one after another.

    Attributes:
        share: numbers of a rank's share, padding included.
        places: where each parameter begins in the bucket.
        parts: of this rank.
    """

    share: int
    places: dict[torch.nn.Parameter, int]
    parts: dict[torch.nn.Parameter, _Part]
    device: torch.device


def gathered_state(optimizer: DistributedOptimizer, model_state: dict[str, Any]) -> Entries:
    """In host memory of its own, on the first of the ranks that divide it; empty on the others. Collective.

    Args:
        model_state: sharded state dict of the weights, which says where each parameter lies in the whole model.
    """
    shards, numbers = _shards(model_state), _numbers(optimizer)
    entries: Entries = {}
    for bucket in _buckets(optimizer):
        for key in _keys(bucket):
            for parameter, entry in _whole_parameters(optimizer, bucket, key, shards).items():
                entries.setdefault(key, {})[numbers[parameter]] = entry
    return entries


def requested_state(optimizer: DistributedOptimizer, model_state: dict[str, Any]) -> Entries:
    """What to load: whole parameters, but only those that this rank keeps a part of."""
    shards, numbers = _shards(model_state), _numbers(optimizer)
    entries: Entries = {}
    for bucket in _buckets(optimizer):
        for key in _keys(bucket):
            for parameter in bucket.parts:
                data = torch.empty(parameter.shape)
                entries.setdefault(key, {})[numbers[parameter]] = _entry(shards[parameter], key, data)
    return entries


def fill(optimizer: DistributedOptimizer, loaded: Entries) -> None:
    """Take over what came of `requested_state`. The state must be allocated."""
    numbers = _numbers(optimizer)
    for bucket in _buckets(optimizer):
        for key in _keys(bucket):
            for parameter, part in bucket.parts.items():
                whole = loaded[key][numbers[parameter]]
                _kept(optimizer, parameter)[key].copy_(whole.flatten()[part.start : part.end])


def _shards(model_state: dict[str, Any]) -> dict[torch.nn.Parameter, ShardedBase]:
    return {value.data: value for value in nested_values(model_state) if isinstance(value, ShardedBase)}


def _numbers(optimizer: DistributedOptimizer) -> dict[torch.nn.Parameter, int]:
    parameters = [parameter for buffer in optimizer.buffers for parameter in buffer.param_index_map]
    return {parameter: number for number, parameter in enumerate(parameters)}


def _keys(bucket: _Bucket) -> tuple[str, ...]:
    """Float32 parameters are the main ones themselves."""
    dtype = next(iter(bucket.places)).dtype
    return _MOMENTS if dtype == torch.float32 else (*_MOMENTS, _MAIN_PARAMETER)


def _entry(shard: ShardedBase, key: str, data: torch.Tensor) -> ShardedBase:
    changed: dict[str, Any] = {"key": f"optimizer.state.{key}.{shard.key}", "data": data}
    if isinstance(shard, ShardedTensor):
        changed["dtype"] = data.dtype
    return replace(shard, **changed)


def _buckets(optimizer: DistributedOptimizer) -> Iterator[_Bucket]:
    """
    Raises:
        RuntimeError: Megatron has laid out its buffers in another way than this module knows. It ends this process, and
            the run with it: other ranks may not see it.
    """
    group = optimizer.data_parallel_group
    for buffer, (ranges,) in zip(optimizer.buffers, map(dict.values, optimizer.gbuf_ranges), strict=True):
        for bucket, of_rank in zip(buffer.buckets, ranges, strict=True):
            share = bucket.grad_data.numel() // group.size()
            places = {
                parameter: buffer.param_index_map[parameter][0] - bucket.offset for parameter in bucket.params_list
            }
            parts = {
                parameter: _Part(start=own["param"].start, end=own["param"].end, place=own["gbuf_local"].start)
                for parameter, own in of_rank["param_map"].items()
            }
            if any(group.rank() * share + p.place - p.start != places.get(name) for name, p in parts.items()):
                raise RuntimeError(
                    "this version of Megatron divides its optimizer in a way that checkpoints cannot follow: set "
                    "learner.distributed_optimizer = false"
                )
            yield _Bucket(share=share, places=places, parts=parts, device=bucket.grad_data.device)


def _kept(optimizer: DistributedOptimizer, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    """This rank's part of a parameter's state; flat."""
    group, index = optimizer.model_param_group_index_map[parameter]
    main = optimizer.optimizer.param_groups[group]["params"][index]
    return {_MAIN_PARAMETER: main, **optimizer.optimizer.state[main]}


def _whole_parameters(
    optimizer: DistributedOptimizer, bucket: _Bucket, key: str, shards: dict[torch.nn.Parameter, ShardedBase]
) -> dict[torch.nn.Parameter, Any]:
    """What this rank writes of a bucket, copied out of the flat buffer, which goes."""
    whole, found = _gather(optimizer, bucket, key), {}
    if whole is not None:
        for parameter, place in bucket.places.items():
            shard = shards[parameter]
            if is_main_replica(shard.replica_id):
                data = whole[place : place + parameter.numel()].view(parameter.shape)
                found[parameter] = _entry(shard, key, data)
    return on_host(found)


def _gather(optimizer: DistributedOptimizer, bucket: _Bucket, key: str) -> torch.Tensor | None:
    """A whole bucket in host memory, padding included, on the first rank."""
    group = optimizer.data_parallel_group
    mine = torch.zeros(bucket.share, device=bucket.device)
    for parameter, part in bucket.parts.items():
        mine[part.place : part.place + part.end - part.start] = _kept(optimizer, parameter)[key].detach()
    whole = torch.empty(group.size(), bucket.share) if group.rank() == 0 else None
    width = max(1, _GATHERED_AT_ONCE // group.size())
    for start in range(0, bucket.share, width):
        sent = mine[start : start + width]
        places = [] if whole is None else [row[start : start + width] for row in whole]
        received = [place if sent.is_cpu else torch.empty_like(sent) for place in places]
        dist.gather(sent, received or None, group=group, group_dst=0)
        for place, part in zip(places, received, strict=True):
            place.copy_(part)
    return None if whole is None else whole.flatten()
