"""Weights between processes of one machine: the receiver reads them where the sender packed them.

sender:    pack into memory that others can map ─> announce where it lies ─> `finish` waits for the receipt
receiver:  map that memory, once ─> load from it ─> `finish` sends the receipt

Only announcements and receipts travel, over gloo. To a rank that cannot read the memory (another machine, user or container)
the bytes follow their announcement. What came mapped is handed on by where it lies, too.
"""

import mmap
import os
import secrets
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_async_rlhf.errors import TransferError
from megatron_async_rlhf.weights.transports.gloo import GlooTransport
from megatron_async_rlhf.weights.transports.rendezvous import first_line
from megatron_async_rlhf.weights.transports.transport import Parcel, Pending, receipt

_PLACE = struct.Struct("<4q")  # owner, descriptor, bytes of the whole memory, where the parcel begins
_FOLLOWS = _PLACE.pack(-1, 0, 0, 0)  # nowhere: the bytes follow
_NAME = "async_rlhf_weights"
# Announcements and receipts may be ahead of bytes that were announced earlier, so these have a lane of their own.
_BYTES_LANE = 1


@dataclass(frozen=True, slots=True)
class _Memory:
    """Memory of one rank that others can map, and this process's mapping of it."""

    owner: int
    descriptor: int
    mapping: torch.Tensor


class SharedMemoryTransport:
    """See `Transport`. Every rank must have met in the store."""

    def __init__(self, control: GlooTransport, store: dist.Store) -> None:
        self.rank, self.world_size, self.timeout_s = control.rank, control.world_size, control.timeout_s
        self.device, self.control = control.device, control
        self._descriptors: list[int] = []
        self._memories: dict[int, _Memory] = {}  # by where they begin in this process
        self._mapped: dict[tuple[int, int], _Memory] = {}  # of other ranks, by owner and descriptor
        try:
            self._pids, self._readers = _who_reads_whom(store, self.rank, self.world_size)
        except (RuntimeError, dist.DistError) as error:
            raise TransferError(
                f"rendezvous: the ranks could not try each other's memory: {first_line(error)}"
            ) from error

    def staging(self, num_bytes: int) -> torch.Tensor:
        size = max(1, num_bytes)
        descriptor = os.memfd_create(_NAME)  # gone with the last process that has it, however that ends
        os.ftruncate(descriptor, size)
        self._descriptors.append(descriptor)
        memory = self._remember(_Memory(self.rank, descriptor, _mapping(descriptor, size)))
        return memory.mapping[:num_bytes]

    def start(self, *, sends: Sequence[Parcel] = (), receives: Sequence[Parcel] = ()) -> Pending:
        announced: list[Parcel] = []
        follow: list[Parcel] = []
        lent: list[Parcel] = []
        for parcel in sends:
            place = self._place_for(parcel)
            message = torch.frombuffer(bytearray(place), dtype=torch.uint8)
            announced.append(Parcel(parcel.peer, message, parcel.what))
            (follow if place == _FOLLOWS else lent).append(parcel)
        headers = [Parcel(p.peer, torch.empty(_PLACE.size, dtype=torch.uint8), p.what) for p in receives]
        pending = [
            self.control.start(sends=announced, receives=headers),
            self.control.start(sends=follow, lane=_BYTES_LANE),
        ]
        receipts = self.control.start(receives=[receipt(parcel) for parcel in lent])
        return _Exchange(self, pending, receipts, list(receives), headers)

    def close(self) -> None:
        self._memories.clear()
        self._mapped.clear()
        while self._descriptors:
            os.close(self._descriptors.pop())
        self.control.close()

    def lent(self, place: bytes, num_bytes: int) -> torch.Tensor | None:
        """Announced bytes in their owner's memory; None if they follow.

        Raises:
            OSError: the owner is gone.
        """
        if place == _FOLLOWS:
            return None
        owner, descriptor, size, begin = _PLACE.unpack(place)
        if (owner, descriptor) not in self._mapped:
            opened = _open(self._pids[owner], descriptor)
            try:
                mapping = _mapping(opened, size)
            finally:
                os.close(opened)
            self._mapped[owner, descriptor] = self._remember(_Memory(owner, descriptor, mapping))
        return self._mapped[owner, descriptor].mapping[begin : begin + num_bytes]

    def _place_for(self, parcel: Parcel) -> bytes:
        """What its peer is told of where the parcel lies."""
        memory = self._memories.get(parcel.buffer.untyped_storage().data_ptr())
        if memory is None or parcel.peer not in self._readers[memory.owner]:
            return _FOLLOWS
        begin = parcel.buffer.storage_offset() * parcel.buffer.element_size()
        return _PLACE.pack(memory.owner, memory.descriptor, memory.mapping.numel(), begin)

    def _remember(self, memory: _Memory) -> _Memory:
        self._memories[memory.mapping.data_ptr()] = memory
        return memory


class _Exchange:
    """Parcels under way. See `Pending`."""

    def __init__(
        self,
        transport: SharedMemoryTransport,
        pending: Sequence[Pending],
        receipts: Pending,
        receives: list[Parcel],
        headers: list[Parcel],
    ) -> None:
        self._transport, self._pending, self._receipts = transport, pending, receipts
        self._receives, self._headers = receives, headers
        self._borrowed: list[Parcel] = []
        self.received: list[torch.Tensor] = []

    def wait(self) -> None:
        for pending in self._pending:
            pending.wait()
        for parcel, header in zip(self._receives, self._headers, strict=True):
            self.received.append(self._place(parcel, header.buffer.numpy().tobytes()))
        self._pending, self._receives, self._headers = [], [], []

    def finish(self) -> None:
        self._receipts.wait()
        self._transport.control.start(sends=[receipt(parcel) for parcel in self._borrowed]).wait()
        self._borrowed.clear()

    def _place(self, parcel: Parcel, place: bytes) -> torch.Tensor:
        control = self._transport.control
        try:
            lent = self._transport.lent(place, parcel.buffer.numel())
        except OSError as error:
            raise control.failure("receive", parcel, error) from error
        if lent is None:
            control.start(receives=[parcel], lane=_BYTES_LANE).wait()
            return parcel.buffer
        self._borrowed.append(parcel)
        return lent


def _mapping(descriptor: int, size: int) -> torch.Tensor:
    return torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)


def _who_reads_whom(store: dist.Store, rank: int, world_size: int) -> tuple[list[int], list[set[int]]]:
    """Every rank's process, and which ranks can read its memory: all try to read a secret of all others."""
    secret = secrets.token_hex(16)
    descriptor = os.memfd_create(_NAME)
    try:
        os.write(descriptor, secret.encode())
        store.set(f"secret/{rank}", f"{os.getpid()} {descriptor} {secret}")
        told = [store.get(f"secret/{peer}").decode().split() for peer in range(world_size)]
        pids = [int(pid) for pid, _, _ in told]
        readable = [peer for peer, (pid, number, held) in enumerate(told) if _holds(int(pid), int(number), held)]
        store.set(f"reads/{rank}", " ".join(map(str, readable)))
        reads = [{int(peer) for peer in store.get(f"reads/{reader}").split()} for reader in range(world_size)]
    finally:
        os.close(descriptor)
    readers = [{reader for reader in range(world_size) if owner in reads[reader]} for owner in range(world_size)]
    return pids, readers


def _holds(pid: int, descriptor: int, secret: str) -> bool:
    try:
        opened = _open(pid, descriptor)
    except OSError:
        return False
    with open(opened, "rb") as file:
        return file.read() == secret.encode()


def _open(pid: int, descriptor: int) -> int:
    """A descriptor of our own for the memory behind another process's.

    Raises:
        OSError: there is no such memory, or none that this process may read.
    """
    path = f"/proc/{pid}/fd/{descriptor}"
    # On another machine the number is another process's, and that descriptor may be a pipe, which a look would empty.
    if not os.readlink(path).startswith(f"/memfd:{_NAME}"):
        raise FileNotFoundError(f"{path} is no memory of this project's")
    return os.open(path, os.O_RDWR)
