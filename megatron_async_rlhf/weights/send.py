"""The learner's half of a push, on every learner rank.

rounds 0, 1: pack slices of my parameters into a staging buffer each ─> wait for the word to begin
round k:     wait for round k-1 to have left ─> start sending ─> hash the slices ─> wait until round k-1 has been read ─> pack
             round k+1 into its buffer, while round k is on its way ...
then:        wait for the last two, compare digests with everyone (`proof`)
"""

from collections import deque
from collections.abc import Callable

import torch

from megatron_async_rlhf.errors import TransferError
from megatron_async_rlhf.types import PushReport
from megatron_async_rlhf.weights.plan import Message, Slice, TransferPlan
from megatron_async_rlhf.weights.proof import conclude
from megatron_async_rlhf.weights.roster import Roster
from megatron_async_rlhf.weights.slice_digests import SliceDigests
from megatron_async_rlhf.weights.transports.transport import Parcel, Pending, Transport

ParameterReader = Callable[[str], torch.Tensor]


class Sender:
    """Sends one learner rank's share of every push; its two staging buffers live as long as the connection."""

    def __init__(self, plan: TransferPlan, roster: Roster, transport: Transport) -> None:
        self._plan, self._roster, self._transport = plan, roster, transport
        self._dtype = getattr(torch, plan.dtype)
        self._rounds = plan.outgoing(transport.rank)
        largest = max((sum(num_elements(m) for _, m in outgoing) for outgoing in self._rounds), default=0)
        num_bytes = largest * self._dtype.itemsize
        self._buffers = [transport.staging(num_bytes).view(self._dtype) for _ in range(2)]

    def push(
        self, read: ParameterReader, *, verify: bool, begin: Callable[[], bool] = lambda: True
    ) -> PushReport | None:
        """Send every slice of the plan that is this rank's. Collective over the transfer group.

        Args:
            read: this rank's parameter by its name in the plan; must not change until this returns.
            begin: called when all is ready to be sent; if it returns false nothing is, and there is no report.

        Raises:
            TransferError: a parameter that does not fit the plan, or a peer that is gone or silent; the connection is
                closed then, so that nobody waits for this rank.
        """
        try:
            packed = deque(self._pack(k, read) for k in range(min(len(self._buffers), len(self._rounds))))
            return self._push(packed, read, verify) if begin() else None
        except BaseException:
            self._transport.close()
            raise

    def _push(self, packed: deque[list[Parcel]], read: ParameterReader, verify: bool) -> PushReport:
        digests = SliceDigests(self._dtype) if verify else None
        under_way: deque[Pending] = deque()
        for k, outgoing in enumerate(self._rounds):
            if not packed:
                under_way.popleft().finish()
                packed.append(self._pack(k, read))
            # Only one round at a time is with the transport. The learner's GPUs have one hardware queue for all streams
            # (CUDA_DEVICE_MAX_CONNECTIONS, see `launch.plan`): a second NCCL kernel would wait at its head for the
            # first, and training's behind it. That first may wait for another learner rank, which may wait for this
            # one in a collective of the training.
            if under_way:
                under_way[-1].wait()
            under_way.append(self._transport.start(sends=packed.popleft()))
            if digests is not None:
                for moved in (moved for _, message in outgoing for moved in message):
                    digests.add(moved, cut(read, moved))
        if under_way:
            under_way[-1].wait()
        for sent in under_way:
            sent.finish()
        joined = None if digests is None else digests.joined(self._plan.sent_by(self._transport.rank))
        return conclude(self._transport, self._roster, self._plan, received_bytes=0, digests=joined)

    def _pack(self, k: int, read: ParameterReader) -> list[Parcel]:
        """Round k, into a buffer that nobody reads any more."""
        buffer = self._buffers[k % len(self._buffers)]
        parcels, begin = [], 0
        for receiver, message in self._rounds[k]:
            end = begin
            for moved in message:
                target = buffer[end : end + moved.size].view(moved.height, moved.width)
                target.copy_(cut(read, moved))
                end += moved.size
            # Later replicas get theirs from the first, see `receive`.
            peer = self._roster.worker_rank(0, receiver)
            parcels.append(Parcel(peer, as_bytes(buffer[begin:end]), describe(message, k)))
            begin = end
        return parcels


def cut(read: ParameterReader, moved: Slice) -> torch.Tensor:
    """A slice as it lies in this rank's parameter, [height, width], a view."""
    parameter = as_matrix(read(moved.source))
    row, col = moved.source_row, moved.source_col
    view = parameter[row : row + moved.height, col : col + moved.width]
    if view.shape != (moved.height, moved.width):
        raise TransferError(
            f"pack: {moved} should lie at row {row}, column {col} of {moved.source}, which only is "
            f"{list(parameter.shape)}; the learner's model is not the planned one"
        )
    return view


def as_matrix(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter with two dimensions; a vector becomes one column."""
    return parameter.detach().view(parameter.shape[0], -1)


def as_bytes(buffer: torch.Tensor) -> torch.Tensor:
    return buffer.view(torch.uint8)


def num_elements(message: Message) -> int:
    return sum(moved.size for moved in message)


def describe(message: Message, round_index: int) -> str:
    """What a parcel is called in messages."""
    last = f" ... {message[-1]}" if len(message) > 1 else ""
    return f"round {round_index} ({message[0]}{last})"
