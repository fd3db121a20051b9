"""How learner ranks and generator workers find each other: a key-value store hosted by learner rank 0."""

import socket
from datetime import timedelta

import torch.distributed as dist

from megatron_async_rlhf.errors import TransferError
from megatron_async_rlhf.weights.roster import Roster

_BACKLOG = 2048  # as torch has it


def host_store(host: str, port: int, timeout_s: float) -> dist.TCPStore:
    """The store itself, on learner rank 0; it outlives the groups that meet through it."""
    try:
        # By itself the store would listen on all addresses of the machine.
        listening = socket.create_server((host, port), backlog=_BACKLOG)
        return dist.TCPStore(
            host,
            port,
            None,
            True,
            timedelta(seconds=timeout_s),
            wait_for_workers=False,
            master_listen_fd=listening.detach(),
        )
    except (OSError, RuntimeError, dist.DistError) as error:
        raise TransferError(f"rendezvous: cannot listen on {host}:{port}: {first_line(error)}") from error


def join_store(host: str, port: int, timeout_s: float) -> dist.TCPStore:
    """A client of the store, on every other rank."""
    try:
        return dist.TCPStore(host, port, None, False, timedelta(seconds=timeout_s), wait_for_workers=False)
    except (RuntimeError, dist.DistError) as error:
        raise TransferError(
            f"rendezvous: learner rank 0 does not listen on {host}:{port} (waited {timeout_s:g} s): {first_line(error)}"
        ) from error


def meet(store: dist.Store, roster: Roster, rank: int, session: str, timeout_s: float) -> dist.Store:
    """Wait until every rank of this session is here; returns the part of the store that is this session's own.

    Raises:
        TransferError: names who did not come.
    """
    own = dist.PrefixStore(session, store)
    keys = [f"here/{peer}" for peer in range(roster.world_size)]
    try:
        own.set(keys[rank], "1")
        own.wait(keys, timedelta(seconds=timeout_s))
    except (RuntimeError, dist.DistError) as error:
        try:
            missing = [roster.name(peer) for peer, key in enumerate(keys) if not own.check([key])]
        except (RuntimeError, dist.DistError):
            missing = ["learner rank 0"]
        raise TransferError(
            f"rendezvous: {', '.join(missing) or 'nobody'} did not come within {timeout_s:g} s "
            f"({roster.name(rank)} waited)"
        ) from error
    return own


def first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
