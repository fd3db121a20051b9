"""Weights between processes on the same GPU: the sender's staging buffers are mapped into the receiver (CUDA IPC).

Only descriptions travel, over gloo: a sender tells where in which buffer its parcel lies, the receiver copies it inside
the GPU and says so. Small parcels (digests, verdicts) that are not in GPU memory go over gloo as they are.
"""

import pickle
from collections.abc import Sequence

import torch
from torch.multiprocessing.reductions import reduce_tensor

from megatron_async_rlhf.weights.transports.gloo import GlooTransport
from megatron_async_rlhf.weights.transports.transport import Parcel

_HEADER_BYTES = 4096  # a pickled CUDA IPC handle is about 500 bytes


class IpcTransport:
    """See `Transport`. All ranks must see the same GPU under the same UUID."""

    def __init__(self, control: GlooTransport, device: torch.device) -> None:
        self.rank, self.world_size, self.timeout_s = control.rank, control.world_size, control.timeout_s
        self.device = device
        self._control = control

    def start(self, *, sends: Sequence[Parcel] = (), receives: Sequence[Parcel] = ()) -> "_Exchange":
        torch.cuda.current_stream(self.device).synchronize()  # what is announced must be there
        announced = [Parcel(p.peer, _describe(p.buffer), p.what) for p in sends]
        headers = [Parcel(p.peer, torch.empty(_HEADER_BYTES, dtype=torch.uint8), p.what) for p in receives]
        taken = [Parcel(p.peer, torch.empty(1, dtype=torch.uint8), f"the receipt for {p.what}") for p in sends]
        pending = self._control.start(sends=announced, receives=headers)
        receipts = self._control.start(receives=taken)
        return _Exchange(self._control, pending, receipts, list(receives), headers)

    def close(self) -> None:
        self._control.close()


class _Exchange:
    def __init__(
        self, control: GlooTransport, pending, receipts, receives: list[Parcel], headers: list[Parcel]
    ) -> None:
        self._control, self._pending, self._receipts = control, pending, receipts
        self._receives, self._headers = receives, headers

    def wait(self) -> None:
        self._pending.wait()
        for parcel, header in zip(self._receives, self._headers, strict=True):
            rebuild, arguments = pickle.loads(header.buffer.numpy().tobytes())
            parcel.buffer.copy_(rebuild(*arguments))
        if self._receives:
            torch.cuda.current_stream(self._receives[0].buffer.device).synchronize()
        done = [Parcel(p.peer, torch.ones(1, dtype=torch.uint8), f"the receipt for {p.what}") for p in self._receives]
        self._control.start(sends=done).wait()
        self._receipts.wait()
        self._receives, self._headers = [], []


def _describe(buffer: torch.Tensor) -> torch.Tensor:
    """How another process finds this GPU memory, padded to a fixed size."""
    payload = pickle.dumps(reduce_tensor(buffer))
    header = torch.zeros(_HEADER_BYTES, dtype=torch.uint8)
    header[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    return header
