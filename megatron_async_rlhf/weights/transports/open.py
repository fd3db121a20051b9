"""Opens the transport a configuration names, once every member of the group is there."""

import torch
import torch.distributed as dist

from megatron_async_rlhf.weights.roster import Roster
from megatron_async_rlhf.weights.transports.gloo import GlooTransport
from megatron_async_rlhf.weights.transports.rendezvous import meet
from megatron_async_rlhf.weights.transports.shared_memory import SharedMemoryTransport
from megatron_async_rlhf.weights.transports.transport import Transport


def open_transport(
    kind: str, store: dist.Store, roster: Roster, rank: int, *, session: str, timeout_s: float, device: torch.device
) -> Transport:
    """Meet the others in `session` and connect.

    Args:
        kind: `gloo`, `nccl` or `ipc`.

    Raises:
        TransferError: names who did not come, or why the connection could not be made.
    """
    own = meet(store, roster, rank, session, timeout_s)
    if kind not in ("gloo", "nccl", "ipc"):
        raise ValueError(f"there is no transport {kind!r}")
    if kind == "nccl":
        from megatron_async_rlhf.weights.transports.nccl import NcclTransport

        return NcclTransport(own, roster, rank, timeout_s, device)
    gloo = GlooTransport(own, roster, rank, timeout_s)
    if kind == "ipc":
        from megatron_async_rlhf.weights.transports.ipc import IpcTransport

        return IpcTransport(gloo, device)
    return SharedMemoryTransport(gloo, own)
