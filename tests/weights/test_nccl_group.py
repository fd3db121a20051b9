"""How the NCCL transport asks torch for its group, without a GPU: torch's CPU build has no such groups to try it on."""

import os
from threading import Event
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatron_async_rlhf.errors import TransferError
from megatron_async_rlhf.weights.roster import Roster
from megatron_async_rlhf.weights.transports.nccl import NcclTransport
from megatron_async_rlhf.weights.transports.transport import Parcel

BLOCKING_WAIT = "TORCH_NCCL_BLOCKING_WAIT"


class Group:
    """What torch's constructor would see; a peer that stays silent."""

    class Options:
        pass

    def __init__(self, store, rank, size, options) -> None:
        self.has_watchdog = os.environ.get(BLOCKING_WAIT) != "1"  # ProcessGroupNCCL.cpp: `if (!blockingWait_)`

    def eager_connect_single_device(self, device) -> None: ...

    def _start_coalescing(self) -> None: ...

    def recv(self, tensors, peer, tag) -> None: ...

    def _end_coalescing(self) -> SimpleNamespace:
        return SimpleNamespace(wait=self._wait)

    def _wait(self, timeout) -> None:
        raise dist.DistBackendError(
            "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=1, OpType=COALESCED, ...) ran for "
            "9000 milliseconds before timing out."
        )


ROSTER = Roster(senders=1, generators=["generator.0"], tensor_parallel=1)


def connect(timeout_s: float) -> NcclTransport:
    return NcclTransport(dist.HashStore(), ROSTER, 0, timeout_s, torch.device("cpu"))


def test_a_communicator_that_is_never_made_is_an_error_at_the_timeout(monkeypatch):
    """`ncclCommInitRank` waits in C for a member that died: nothing can stop it, so it is left behind."""
    waits, released = Event(), Event()

    class Waiting(Group):
        def eager_connect_single_device(self, device) -> None:
            waits.set()
            released.wait(60)

    monkeypatch.setattr(dist, "ProcessGroupNCCL", Waiting, raising=False)
    try:
        with pytest.raises(TransferError) as told:
            connect(0.2)
        assert waits.wait(60)
        assert "learner rank 0 could not make an NCCL communicator within 0.2 s (weights.timeout_s)" in str(told.value)
    finally:
        released.set()


def test_what_nccl_says_of_a_communicator_is_told_in_one_line(monkeypatch):
    class Duplicate(Group):
        def eager_connect_single_device(self, device) -> None:
            raise dist.DistBackendError("NCCL error in: init.cu: invalid usage\nDuplicate GPU detected")

    monkeypatch.setattr(dist, "ProcessGroupNCCL", Duplicate, raising=False)
    with pytest.raises(
        TransferError, match="could not make an NCCL communicator: NCCL error in: init.cu: invalid usage$"
    ):
        connect(9.0)


@pytest.mark.parametrize("before", [None, "0"])
def test_only_wait_watches_over_a_push(monkeypatch, before):
    monkeypatch.setattr(dist, "ProcessGroupNCCL", Group, raising=False)
    monkeypatch.delenv(BLOCKING_WAIT, raising=False)
    if before is not None:
        monkeypatch.setenv(BLOCKING_WAIT, before)
    transport = connect(9.0)
    assert not transport._group.has_watchdog
    assert os.environ.get(BLOCKING_WAIT) == before  # the groups of training keep theirs

    pending = transport.start(receives=[Parcel(1, torch.empty(8, dtype=torch.uint8), "the digests")])
    with pytest.raises(TransferError) as told:
        pending.wait()
    assert str(told.value) == (
        "receive of the digests from generator.0 rank 0 failed on learner rank 0: nothing moved for 9 s "
        "(weights.timeout_s)"
    )


def test_a_peer_that_never_takes_part_is_named_at_the_timeout(monkeypatch):
    """The end of the first group call with a peer waits for it in C; those after it come back at once."""
    released, calls = Event(), []

    class Absent(Group):
        def send(self, tensors, peer, tag) -> None:
            calls.append(peer)

        def _end_coalescing(self):
            if calls[-1] == 2:
                released.wait(60)
            return SimpleNamespace(wait=lambda timeout: None)

    monkeypatch.setattr(dist, "ProcessGroupNCCL", Absent, raising=False)
    roster = Roster(senders=1, generators=["generator.0", "generator.1"], tensor_parallel=1)
    transport = NcclTransport(dist.HashStore(), roster, 0, 0.2, torch.device("cpu"))
    parcels = [Parcel(peer, torch.empty(8, dtype=torch.uint8), "the digests") for peer in (1, 2)]
    try:
        for _ in range(2):
            transport.start(sends=parcels[:1]).wait()
        with pytest.raises(TransferError) as told:
            transport.start(sends=parcels[1:])
        assert str(told.value) == (
            "send of the digests to generator.1 rank 0 failed on learner rank 0: nothing moved for 0.2 s (weights.timeout_s)"
        )
        transport.close()  # does not wait for the call that is left behind
        with pytest.raises(TransferError, match="connect again"):
            transport.start(sends=parcels[:1])
    finally:
        released.set()
