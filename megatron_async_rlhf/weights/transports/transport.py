"""What a push needs of a network: start sending and receiving buffers, wait for them with a timeout."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class Parcel:
    """A contiguous byte buffer to or from one peer; `what` says in messages what is inside."""

    peer: int
    buffer: torch.Tensor
    what: str


def receipt(parcel: Parcel) -> Parcel:
    """What a receiver sends back once it has read a parcel where the sender keeps it."""
    return Parcel(parcel.peer, torch.ones(1, dtype=torch.uint8), f"the receipt for {parcel.what}")


class Pending(Protocol):
    """Parcels under way."""

    @property
    def received(self) -> Sequence[torch.Tensor]:
        """After `wait`: where the bytes of each received parcel are, its buffer or memory of another process."""
        ...

    def wait(self) -> None:
        """Return when all have left or arrived.

        Raises:
            TransferError: a peer is gone or silent for longer than the timeout; names the parcel and the peer.
        """
        ...

    def finish(self) -> None:
        """To be called after `wait`, when what was received has been read. A sender's returns when all receivers have
        called theirs: what it sent may change from then on.

        Raises:
            TransferError: as `wait`.
        """
        ...


class Transport(Protocol):
    """A group of learner ranks and generator workers. Parcels between two ranks arrive in the order they were started.

    Attributes:
        device: where buffers of weights must be.
        control: the transport for small messages, with buffers on its device.
        timeout_s: how long any one wait may take.
    """

    rank: int
    world_size: int
    device: torch.device
    timeout_s: float

    @property
    def control(self) -> "Transport": ...

    def staging(self, num_bytes: int) -> torch.Tensor:
        """A byte buffer to pack weights into or to receive them in; it lives as long as the transport."""
        ...

    def start(self, *, sends: Sequence[Parcel] = (), receives: Sequence[Parcel] = ()) -> Pending: ...

    def close(self) -> None:
        """Leave the group; peers that wait for this rank fail at once instead of at their timeout."""
        ...
