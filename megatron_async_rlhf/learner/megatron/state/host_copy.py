"""Copies a sharded state dict to host memory, so that training can continue while the copy is written."""

from dataclasses import replace
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica


def on_host(state: dict[str, Any]) -> dict[str, Any]:
    """The same state, changed in place: what this rank will write of it is in host memory of its own."""

    def copied(value: Any) -> Any:
        if isinstance(value, ShardedTensor) and is_main_replica(value.replica_id):
            return replace(value, data=value.data.detach().to("cpu", copy=True))
        return value

    apply_factories(state)  # before copying: later Megatron would copy once more what they divide
    dict_list_map_inplace(copied, state)
    return state
