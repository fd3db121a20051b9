"""Weights over sockets, through a gloo process group of the push's own.

It never touches `torch.distributed`'s default group, so a learner and a vLLM worker, each with their own, can both
be in one.
"""

import weakref
from collections import deque
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_async_rlhf.errors import TransferError
from megatron_async_rlhf.weights.blame import CONNECTION_GONE, account
from megatron_async_rlhf.weights.roster import Roster
from megatron_async_rlhf.weights.transports.rendezvous import first_line
from megatron_async_rlhf.weights.transports.transport import Parcel


class GlooTransport:
    """See `Transport`. The store must have been met in: every rank is there."""

    device = torch.device("cpu")

    def __init__(self, store: dist.Store, roster: Roster, rank: int, timeout_s: float) -> None:
        self.rank, self.world_size, self.timeout_s = rank, roster.world_size, timeout_s
        self._roster = roster
        self._started: weakref.WeakSet[_Works] = weakref.WeakSet()
        try:
            self._group = dist.ProcessGroupGloo(
                dist.PrefixStore("gloo", store), rank, roster.world_size, timedelta(seconds=timeout_s)
            )
        except (RuntimeError, dist.DistError) as error:
            raise TransferError(
                f"rendezvous: {roster.name(rank)} could not connect to the other {roster.world_size - 1} ranks: "
                f"{first_line(error)}"
            ) from error

    @property
    def control(self) -> "GlooTransport":
        return self

    def staging(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def start(self, *, sends: Sequence[Parcel] = (), receives: Sequence[Parcel] = (), lane: int = 0) -> "_Works":
        """
        Args:
            lane: parcels arrive in the order they were started among those of one lane.
        """
        if self._group is None:
            raise TransferError("the connection of an earlier push was closed after it failed; connect again")
        works = _Works(self, [parcel.buffer for parcel in receives])
        self._started.add(works)
        for verb, parcels in (("receive", receives), ("send", sends)):
            for parcel in parcels:
                works.append(verb, parcel, self._begin(verb, parcel, lane))
        return works

    def _begin(self, verb: str, parcel: Parcel, lane: int) -> dist.Work:
        try:
            if verb == "receive":
                return self._group.recv([parcel.buffer], parcel.peer, lane)
            return self._group.send([parcel.buffer], parcel.peer, lane)
        except (RuntimeError, dist.DistError) as error:
            raise self.failure(verb, parcel, error) from error

    def close(self) -> None:
        # Sockets close, and peers notice, only once nothing refers to the group any more: neither abort() nor
        # shutdown() of a gloo group closes them.
        for works in self._started:
            works.forget()
        self._group = None

    def failure(self, verb: str, parcel: Parcel, error: Exception) -> TransferError:
        """What became of a parcel that did not leave or arrive."""
        cause = first_line(error)
        if "imed out" in cause:
            cause = f"nothing moved for {self.timeout_s:g} s (weights.timeout_s)"
        elif "onnection" in cause or "roken pipe" in cause or isinstance(error, OSError):
            cause = f"{CONNECTION_GONE}: that process ended, or closed it because its own part failed"
        what = f"{verb} of {parcel.what} {'from' if verb == 'receive' else 'to'}"
        return TransferError(account(what, self._roster.name(parcel.peer), self._roster.name(self.rank), cause))


class _Works:
    """The started parcels, waited for in order."""

    def __init__(self, transport: GlooTransport, received: list[torch.Tensor]) -> None:
        self.received = received
        self._transport = transport
        self._works: deque[tuple[str, Parcel, dist.Work]] = deque()

    def append(self, verb: str, parcel: Parcel, work: dist.Work) -> None:
        self._works.append((verb, parcel, work))

    def wait(self) -> None:
        while self._works:
            try:
                self._works[0][2].wait(timedelta(seconds=self._transport.timeout_s))
            except (RuntimeError, dist.DistError) as error:
                raise self._transport.failure(*self._works[0][:2], error) from error
            self._works.popleft()

    def finish(self) -> None:
        """The receiver has bytes of its own."""

    def forget(self) -> None:
        self._works.clear()
