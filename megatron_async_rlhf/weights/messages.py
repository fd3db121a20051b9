"""Small messages between members of a transfer group: what they agree on before and after the weights themselves."""

import msgspec
import torch
from msgspec import Struct

from megatron_async_rlhf.errors import TransferError
from megatron_async_rlhf.weights.roster import Roster
from megatron_async_rlhf.weights.transports.transport import Parcel, Transport


def send_message(transport: Transport, payload: bytes, peers: list[int], what: str) -> None:
    for part in (len(payload).to_bytes(8, "little"), payload):
        if part:
            buffer = torch.frombuffer(bytearray(part), dtype=torch.uint8).to(transport.control.device)
            transport.control.start(sends=[Parcel(peer, buffer, what) for peer in peers]).wait()


def receive_message(transport: Transport, peer: int, what: str) -> bytes:
    size = int.from_bytes(_receive(transport, 8, peer, what), "little")
    return _receive(transport, size, peer, what) if size else b""


def _receive(transport: Transport, size: int, peer: int, what: str) -> bytes:
    buffer = torch.empty(size, dtype=torch.uint8, device=transport.control.device)
    transport.control.start(receives=[Parcel(peer, buffer, what)]).wait()
    return buffer.cpu().numpy().tobytes()


class _Statement(Struct, frozen=True):
    fingerprint: str
    error: str | None


def agree(transport: Transport, roster: Roster, fingerprint: str, error: str | None = None) -> None:
    """Every rank says which plan it made and whether it can take part; all continue, or all raise the same error.

    Raises:
        TransferError: names the rank that cannot, or that planned something else than learner rank 0.
    """
    what = "the plan's fingerprint"
    mine = msgspec.msgpack.encode(_Statement(fingerprint, error))
    if transport.rank:
        send_message(transport, mine, [0], what)
        verdict = receive_message(transport, 0, what).decode()
    else:
        peers = range(1, roster.world_size)
        others = (msgspec.msgpack.decode(receive_message(transport, p, what), type=_Statement) for p in peers)
        verdict = _complaint(roster, [_Statement(fingerprint, error), *others])
        send_message(transport, verdict.encode(), list(peers), what)
    if verdict:
        transport.close()
        raise TransferError(f"rendezvous: {verdict}")


def _complaint(roster: Roster, statements: list[_Statement]) -> str:
    for rank, statement in enumerate(statements):
        if statement.error:
            return f"{roster.name(rank)}: {statement.error}"
    for rank, statement in enumerate(statements):
        if statement.fingerprint != statements[0].fingerprint:
            return (
                f"{roster.name(rank)} planned another transfer than learner rank 0: its model, layout, precision or "
                "weights.staging_mib is not the learner's; start both from the same configuration"
            )
    return ""
