"""Weights between processes on the same GPU: the sender's staging buffers are mapped into the receiver (CUDA IPC).

Only descriptions travel, over gloo: a sender tells where in which buffer its parcel lies, the receiver copies it inside
the GPU and says so. A buffer is described and mapped once: each description that torch makes of it counts the
receiver's uses anew, and a mapping costs more than a copy.
"""

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import torch
from torch.multiprocessing import reductions

from megatron_async_rlhf.weights.transports.gloo import GlooTransport
from megatron_async_rlhf.weights.transports.transport import Parcel, Pending, receipt

_HEADER_BYTES = 1024  # a description has about 250 bytes
_LENGTH_BYTES = 2  # in front of it


class IpcTransport:
    """See `Transport`. All ranks must see the same GPU under the same UUID."""

    def __init__(self, control: GlooTransport, device: torch.device) -> None:
        self.rank, self.world_size, self.timeout_s = control.rank, control.world_size, control.timeout_s
        self.device, self.control = device, control
        # Own buffers by where they begin; held here, so that the place stays theirs.
        self._described: dict[int, tuple[torch.Tensor, bytes]] = {}
        self._mapped: dict[bytes, torch.Tensor] = {}  # other processes' buffers, by their description

    def staging(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def start(self, *, sends: Sequence[Parcel] = (), receives: Sequence[Parcel] = ()) -> Pending:
        torch.cuda.current_stream(self.device).synchronize()  # what is announced must be there
        announced = [Parcel(p.peer, self._announcement(p.buffer), p.what) for p in sends]
        headers = [Parcel(p.peer, torch.empty(_HEADER_BYTES, dtype=torch.uint8), p.what) for p in receives]
        pending = self.control.start(sends=announced, receives=headers)
        receipts = self.control.start(receives=[receipt(parcel) for parcel in sends])
        return _Exchange(self.control, pending, receipts, list(receives), headers, self._sent)

    def close(self) -> None:
        self._mapped.clear()
        self._described.clear()
        self.control.close()

    def _announcement(self, buffer: torch.Tensor) -> torch.Tensor:
        """How another process finds this GPU memory, padded to a fixed size."""
        storage = buffer.untyped_storage()
        if storage.data_ptr() not in self._described:
            whole = torch.empty(0, dtype=torch.uint8, device=buffer.device).set_(storage)
            self._described[storage.data_ptr()] = whole, describe(whole)
        begin = buffer.storage_offset() * buffer.element_size()
        payload = msgspec.msgpack.encode((self._described[storage.data_ptr()][1], begin))
        framed = len(payload).to_bytes(_LENGTH_BYTES, "little") + payload
        return torch.frombuffer(bytearray(framed.ljust(_HEADER_BYTES, b"\0")), dtype=torch.uint8)

    def _sent(self, header: torch.Tensor, size: int) -> torch.Tensor:
        """The announced bytes, in the sender's memory."""
        framed = header.numpy().tobytes()
        payload = framed[_LENGTH_BYTES:][: int.from_bytes(framed[:_LENGTH_BYTES], "little")]
        described, begin = msgspec.msgpack.decode(payload, type=tuple[bytes, int])
        if described not in self._mapped:
            self._mapped[described] = map_here(described)
        return self._mapped[described][begin : begin + size]


def describe(buffer: torch.Tensor) -> bytes:
    """Bytes on a GPU, for `map_here` in another process: what torch would pickle, which runs whatever it is told to."""
    _, (_, size, stride, offset, _, _, *handles) = reductions.reduce_tensor(buffer)
    return msgspec.msgpack.encode([list(size), list(stride), offset, handles])


def map_here(description: bytes) -> torch.Tensor:
    """The same memory, mapped into this process."""
    size, stride, offset, handles = msgspec.msgpack.decode(
        description, type=tuple[list[int], list[int], int, list[Any]]
    )
    return reductions.rebuild_cuda_tensor(
        torch.Tensor, torch.Size(size), tuple(stride), offset, torch.storage.TypedStorage, torch.uint8, *handles
    )


class _Exchange:
    def __init__(
        self,
        control: GlooTransport,
        pending: Pending,
        receipts: Pending,
        receives: list[Parcel],
        headers: list[Parcel],
        sent: Callable[[torch.Tensor, int], torch.Tensor],
    ) -> None:
        self._control, self._pending, self._receipts, self._sent = control, pending, receipts, sent
        self._receives, self._headers = receives, headers
        self.received = [parcel.buffer for parcel in receives]

    def finish(self) -> None:
        """The receiver has copied the bytes."""

    def wait(self) -> None:
        self._pending.wait()
        for parcel, header in zip(self._receives, self._headers, strict=True):
            parcel.buffer.copy_(self._sent(header.buffer, parcel.buffer.numel()))
        if self._receives:
            torch.cuda.current_stream(self._receives[0].buffer.device).synchronize()
        self._control.start(sends=[receipt(parcel) for parcel in self._receives]).wait()
        self._receipts.wait()
        self._receives, self._headers = [], []
