"""How the NCCL transport asks torch for its group, without a GPU: torch's CPU build has no such groups to try it on."""

import os
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

    def _start_coalescing(self) -> None: ...

    def recv(self, tensors, peer, tag) -> None: ...

    def _end_coalescing(self) -> SimpleNamespace:
        return SimpleNamespace(wait=self._wait)

    def _wait(self, timeout) -> None:
        raise dist.DistBackendError(
            "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=1, OpType=COALESCED, ...) ran for "
            "9000 milliseconds before timing out."
        )


@pytest.mark.parametrize("before", [None, "0"])
def test_only_wait_watches_over_a_push(monkeypatch, before):
    monkeypatch.setattr(dist, "ProcessGroupNCCL", Group, raising=False)
    monkeypatch.delenv(BLOCKING_WAIT, raising=False)
    if before is not None:
        monkeypatch.setenv(BLOCKING_WAIT, before)
    roster = Roster(senders=1, generators=["generator.0"], tensor_parallel=1)
    transport = NcclTransport(dist.HashStore(), roster, 0, 9.0, torch.device("cpu"))
    assert not transport._group.has_watchdog
    assert os.environ.get(BLOCKING_WAIT) == before  # the groups of training keep theirs

    pending = transport.start(receives=[Parcel(1, torch.empty(8, dtype=torch.uint8), "the digests")])
    with pytest.raises(TransferError) as told:
        pending.wait()
    assert str(told.value) == (
        "receive of the digests from generator.0 rank 0 failed on learner rank 0: nothing moved for 9 s "
        "(weights.timeout_s)"
    )
