"""Weights between GPUs, through an NCCL communicator of the push's own. Every round is one NCCL group call.

A failure is reported by `wait` alone. torch's watchdog would end the whole process for it: at a group's timeout, at any
error of its communicator, and when `wait` has aborted that because a peer is silent. So the group has none
(`TORCH_NCCL_BLOCKING_WAIT`, which is made for this: `wait` looks for errors and timeouts itself). Only the environment
can tell torch, and torch reads it when a group is made; the groups that training uses keep their watchdogs.

The communicator is made at once, not with the first parcel, in a thread that is left behind at the timeout: NCCL waits for
the other members without a limit of its own, and a member that dies meanwhile would hold up the others for ever. So does
the first exchange with a peer, for which NCCL makes a connection when the group call ends.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from threading import Thread

import torch
import torch.distributed as dist

from megatron_async_rlhf.errors import TransferError
from megatron_async_rlhf.weights.blame import account
from megatron_async_rlhf.weights.roster import Roster
from megatron_async_rlhf.weights.transports.rendezvous import first_line
from megatron_async_rlhf.weights.transports.transport import Parcel


class NcclTransport:
    """See `Transport`. One GPU per rank: NCCL refuses two ranks on the same one (use `ipc` there)."""

    def __init__(self, store: dist.Store, roster: Roster, rank: int, timeout_s: float, device: torch.device) -> None:
        self.rank, self.world_size, self.timeout_s = rank, roster.world_size, timeout_s
        self.device = device
        self._roster = roster
        self._met: set[tuple[str, int]] = set()  # peers that something was sent to, or received from
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=timeout_s)  # without a watchdog: how long an abort may take
        try:
            with _no_watchdog():
                self._group = dist.ProcessGroupNCCL(dist.PrefixStore("nccl", store), rank, roster.world_size, options)
            made = self._within(partial(self._group.eager_connect_single_device, device))
        except (RuntimeError, dist.DistError) as error:
            raise TransferError(
                f"rendezvous: {roster.name(rank)} could not make an NCCL communicator: {first_line(error)}"
            ) from error
        if not made:
            self._group = None  # the thread has it still: NCCL allows nobody else to touch what it is making
            raise TransferError(
                f"rendezvous: {roster.name(rank)} could not make an NCCL communicator within {timeout_s:g} s "
                "(weights.timeout_s): another member ended or hangs, or NCCL finds no way between their GPUs "
                "(NCCL_DEBUG=INFO tells more)"
            )

    @property
    def control(self) -> "NcclTransport":
        return self

    def staging(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def start(self, *, sends: Sequence[Parcel] = (), receives: Sequence[Parcel] = ()) -> "_Group":
        if self._group is None:
            raise TransferError("the connection of an earlier push was closed after it failed; connect again")
        parcels = [*(("receive", p) for p in receives), *(("send", p) for p in sends)]
        group = _Group(self._roster, self.rank, self.timeout_s, parcels)
        if not parcels:
            return group
        peers = {(verb, parcel.peer) for verb, parcel in parcels}
        begin = partial(self._begin, self._group, group, parcels)
        try:
            if peers <= self._met:
                begin()
            elif not self._within(begin):
                self._group = None  # as above
                raise RuntimeError("operation timeout")
        except (RuntimeError, dist.DistError) as error:
            raise group.failure(error) from error
        self._met |= peers
        return group

    @staticmethod
    def _begin(group: "dist.ProcessGroupNCCL", call: "_Group", parcels: list[tuple[str, Parcel]]) -> None:
        group._start_coalescing()
        for verb, parcel in parcels:
            begin = group.recv if verb == "receive" else group.send
            begin([parcel.buffer], parcel.peer, 0)
        call.work = group._end_coalescing()

    def _within(self, act: Callable[[], None]) -> bool:
        """As below, on the device and the stream of whoever calls this, which a new thread does not have."""
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None

        def act_there() -> None:
            if stream is not None:
                torch.cuda.set_device(self.device)
                torch.cuda.set_stream(stream)
            act()

        return _within(self.timeout_s, act_there)

    def close(self) -> None:
        if self._group is not None:
            self._group.abort()
            self._group = None


class _Group:
    """All parcels of one NCCL group call; they complete together."""

    def __init__(self, roster: Roster, rank: int, timeout_s: float, parcels: list[tuple[str, Parcel]]) -> None:
        self._roster, self._rank, self._timeout_s, self._parcels = roster, rank, timeout_s, parcels
        self.work: dist.Work | None = None
        self.received = [parcel.buffer for verb, parcel in parcels if verb == "receive"]

    def finish(self) -> None:
        """The receiver has bytes of its own."""

    def wait(self) -> None:
        if self.work is None:
            return
        try:
            self.work.wait(timedelta(seconds=self._timeout_s))
        except (RuntimeError, dist.DistError) as error:
            raise self.failure(error) from error
        self.work = None

    def failure(self, error: Exception) -> TransferError:
        # They complete together, so any of the peers may be the one that failed; the first stands for all.
        verb, parcel = self._parcels[0]
        what = f"{verb} of {parcel.what} {'from' if verb == 'receive' else 'to'}"
        peer, witness = self._roster.name(parcel.peer), self._roster.name(self._rank)
        cause = first_line(error)
        if "operation timeout" in cause:
            cause = f"nothing moved for {self._timeout_s:g} s (weights.timeout_s)"
        return TransferError(account(what, peer, witness, cause))


def _within(timeout_s: float, act: Callable[[], None]) -> bool:
    """Whether `act` returned in time; what it raises is raised. Its thread does not keep the process from ending."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            act()
        except BaseException as failure:
            failures.append(failure)

    thread = Thread(target=run, name="nccl-first-contact", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if failures:
        raise failures[0]
    return not thread.is_alive()


@contextmanager
def _no_watchdog() -> Iterator[None]:
    """A group that is made in here has no thread that watches over it."""
    name = "TORCH_NCCL_BLOCKING_WAIT"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
