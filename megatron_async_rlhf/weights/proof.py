"""The end of a push: every rank reports what it holds, learner rank 0 compares and tells everyone the verdict.

Senders hash the slices of their own parameters, receivers hash the same slices of theirs after loading them, so a bit
that flipped in a staging buffer, on the wire or in the receiver's memory shows.
"""

from collections.abc import Iterator

import msgspec

from megatron_async_rlhf.types import PushReport
from megatron_async_rlhf.weights.messages import receive_message, send_message
from megatron_async_rlhf.weights.plan import TransferPlan
from megatron_async_rlhf.weights.roster import Roster
from megatron_async_rlhf.weights.slice_digests import DIGEST_BYTES
from megatron_async_rlhf.weights.transports.transport import Transport


def conclude(
    transport: Transport, roster: Roster, plan: TransferPlan, *, received_bytes: int, digests: bytes | None
) -> PushReport:
    """Collective over the transfer group.

    Args:
        received_bytes: weights this rank received; 0 on a learner rank.
        digests: of this rank's slices in plan order, 16 bytes each; None when the push is not verified.

    Raises:
        TransferError: a rank is gone or silent.
    """
    report = received_bytes.to_bytes(8, "little") + (digests or b"")
    if transport.rank == 0:
        peers = list(range(1, roster.world_size))
        reports = [report, *(receive_message(transport, peer, "the digests") for peer in peers)]
        verdict = _judge(roster, plan, reports, verify=digests is not None)
        send_message(transport, msgspec.msgpack.encode(verdict), peers, "the verdict")
        return verdict
    send_message(transport, report, [0], "the digests")
    return msgspec.msgpack.decode(receive_message(transport, 0, "the verdict"), type=PushReport)


def _judge(roster: Roster, plan: TransferPlan, reports: list[bytes], *, verify: bool) -> PushReport:
    wire_bytes = sum(int.from_bytes(report[:8], "little") for report in reports)
    if not verify:
        return PushReport(wire_bytes=wire_bytes, generators=len(roster.generators))
    sent = {
        (sender, receiver): digests
        for sender in range(roster.senders)
        for receiver, digests in _by_peer(plan, reports[sender][8:], sender=sender)
    }
    compared, mismatches = 0, []
    for replica in range(len(roster.generators)):
        for worker in range(roster.tensor_parallel):
            rank = roster.worker_rank(replica, worker)
            for sender, digests in _by_peer(plan, reports[rank][8:], receiver=worker):
                slices = [s for message in plan.streams[sender, worker] for s in message]
                compared += len(slices)
                pairs = zip(slices, _each(digests), _each(sent[sender, worker]), strict=True)
                mismatches += [
                    f"{roster.name(rank)}: {moved} from {roster.name(sender)}"
                    for moved, theirs, ours in pairs
                    if theirs != ours
                ]
    generators = len(roster.generators)
    return PushReport(wire_bytes=wire_bytes, generators=generators, compared=compared, mismatches=mismatches)


def _by_peer(
    plan: TransferPlan, digests: bytes, *, sender: int | None = None, receiver: int | None = None
) -> Iterator[tuple[int, bytes]]:
    """One rank's digests cut by the stream they belong to: (the other end, its part)."""
    offset = 0
    for (a, b), messages in plan.streams.items():
        if sender in (None, a) and receiver in (None, b):
            size = DIGEST_BYTES * sum(len(message) for message in messages)
            yield (a if sender is None else b), digests[offset : offset + size]
            offset += size


def _each(digests: bytes) -> list[bytes]:
    return [digests[i : i + DIGEST_BYTES] for i in range(0, len(digests), DIGEST_BYTES)]
