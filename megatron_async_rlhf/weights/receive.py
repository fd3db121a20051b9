"""The generator's half of a push, in every worker of every replica.

    first replica:  receive round k from the learner ─┬─> hand it to the next replica's same worker
                                                      └─> copy its slices into my parameters
    next replicas:  receive round k from the replica before, then the same

A parameter is complete when its last slice is in; then it is hashed slice by slice and given to the engine. Nothing
here knows vLLM: what a parameter is and what completing it means is the `Target`'s affair.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch

from megatron_async_rlhf.errors import TransferError
from megatron_async_rlhf.types import PushReport
from megatron_async_rlhf.weights.plan import Slice, TransferPlan
from megatron_async_rlhf.weights.proof import conclude
from megatron_async_rlhf.weights.roster import Roster
from megatron_async_rlhf.weights.send import as_matrix, describe, num_elements
from megatron_async_rlhf.weights.slice_digests import SliceDigests
from megatron_async_rlhf.weights.transports.transport import Parcel, Pending, Transport

# Hashes what a parameter really holds, if the push is verified.
Check = Callable[[torch.Tensor], None]


class Target(Protocol):
    """A worker's model as a place to put weights."""

    def open(self, parameter: str) -> torch.Tensor:
        """The memory to copy slices of a parameter into."""
        ...

    def complete(self, parameter: str, check: Check) -> None:
        """All of it is there: call `check` with the bytes the engine will use (or is about to repack), then use it."""
        ...


class Receiver:
    """Receives one worker's share of every push; its staging buffers live as long as the connection."""

    def __init__(self, plan: TransferPlan, roster: Roster, transport: Transport) -> None:
        self._plan, self._roster, self._transport = plan, roster, transport
        self._dtype = getattr(torch, plan.dtype)
        self._replica, self._worker = roster.place(transport.rank)
        self._rounds = plan.incoming(self._worker)
        self._sizes = [sum(num_elements(message) for _, message in incoming) for incoming in self._rounds]
        num_bytes = max(self._sizes, default=0) * self._dtype.itemsize
        self._buffers = [transport.staging(num_bytes) for _ in range(2)]
        self._slices_of: dict[str, list[Slice]] = defaultdict(list)
        for moved in plan.received_by(self._worker):
            self._slices_of[moved.target].append(moved)

    def receive(self, target: Target, *, verify: bool) -> PushReport:
        """Receive a whole push. Collective over the transfer group.

        Raises:
            TransferError: a peer that is gone or silent, or weights that differ from the sender's; the target may hold
                parts of two versions then and must not be used before a later push succeeds.
        """
        try:
            verdict = self._receive(target, verify)
        except BaseException:
            self._transport.close()
            raise
        if verdict.mismatches:
            raise TransferError(
                f"verify: {len(verdict.mismatches)} of {verdict.compared} digests differ, first {verdict.mismatches[0]}"
            )
        return verdict

    def _receive(self, target: Target, verify: bool) -> PushReport:
        depth = len(self._buffers)
        arriving = {k: self._start(k) for k in range(min(depth, len(self._rounds)))}
        missing = {parameter: len(slices) for parameter, slices in self._slices_of.items()}
        digests = SliceDigests(self._dtype) if verify else None
        for k in range(len(self._rounds)):
            arrived = arriving.pop(k)
            arrived.wait()
            handed_on = self._hand_on(k, arrived.received)
            self._load(k, arrived.received, target, missing, digests)
            handed_on.wait()
            handed_on.finish()
            arrived.finish()
            if k + depth < len(self._rounds):
                arriving[k + depth] = self._start(k + depth)
        joined = None if digests is None else digests.joined(self._plan.received_by(self._worker))
        num_bytes = sum(self._sizes) * self._dtype.itemsize
        return conclude(self._transport, self._roster, self._plan, received_bytes=num_bytes, digests=joined)

    def _start(self, k: int) -> Pending:
        sizes = [num_elements(message) * self._dtype.itemsize for _, message in self._rounds[k]]
        parts = self._buffers[k % len(self._buffers)][: sum(sizes)].split(sizes)
        return self._transport.start(receives=self._parcels(k, parts, self._replica - 1))

    def _hand_on(self, k: int, received: Sequence[torch.Tensor]) -> Pending:
        if self._replica + 1 == len(self._roster.generators):
            return self._transport.start()
        return self._transport.start(sends=self._parcels(k, received, self._replica + 1))

    def _parcels(self, k: int, buffers: Sequence[torch.Tensor], replica: int) -> list[Parcel]:
        """A round's messages, from or to the same worker of another replica; -1 stands for the learner."""
        neighbour = self._roster.worker_rank(replica, self._worker)
        return [
            Parcel(neighbour if replica >= 0 else sender, buffer, describe(message, k))
            for (sender, message), buffer in zip(self._rounds[k], buffers, strict=True)
        ]

    def _load(
        self,
        k: int,
        received: Sequence[torch.Tensor],
        target: Target,
        missing: dict[str, int],
        digests: SliceDigests | None,
    ) -> None:
        for (_, message), buffer in zip(self._rounds[k], received, strict=True):
            values, begin = buffer.view(self._dtype), 0
            for moved in message:
                matrix = values[begin : begin + moved.size].view(moved.height, moved.width)
                place(target.open(moved.target), moved).copy_(matrix)
                begin += moved.size
                missing[moved.target] -= 1
                if not missing[moved.target]:
                    target.complete(moved.target, partial(_digest, self._slices_of[moved.target], digests))


def _digest(slices: list[Slice], digests: SliceDigests | None, parameter: torch.Tensor) -> None:
    if digests is not None:
        for moved in slices:
            digests.add(moved, place(parameter, moved))


def place(parameter: torch.Tensor, moved: Slice) -> torch.Tensor:
    """Where a slice goes in a worker's parameter, [height, width], a view."""
    row, col = moved.target_row, moved.target_col
    view = as_matrix(parameter)[row : row + moved.height, col : col + moved.width]
    if view.shape != (moved.height, moved.width):
        raise TransferError(
            f"load: {moved} should go to row {row}, column {col} of {moved.target}, which only is "
            f"{list(parameter.shape)}; the generator's model is not the planned one"
        )
    return view
