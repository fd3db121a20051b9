"""Who sends which slice to whom: the same plan on every rank, from both sides' pieces. Plain integers, no torch.

    learner pieces ─┐                       per (sender, receiver): messages of slices, one message per round
                    ├─ intersect ─ assign ─ pack ─>
    generator pieces┘

Every byte of every receiver is sent exactly once. A rectangle that several ranks hold (data-parallel replicas, norms,
tied embeddings) is divided among them, or given to the least loaded one if it is small. In a round a rank packs, or
receives, at most one staging buffer. The plan covers one generator replica: the others get theirs from it.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import ConfigError, MappingError
from megatron_async_rlhf.formats.tensor_spec import ITEM_BYTES
from megatron_async_rlhf.models.architecture import Architecture
from megatron_async_rlhf.models.layout import LearnerLayout, Piece, generator_pieces, learner_pieces

# Dividing a smaller rectangle among its holders would cost more in messages than it balances.
_WORTH_DIVIDING_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """A rectangle of a Hugging Face tensor on its way from one parameter to another.

    Attributes:
        rows, cols: half-open ranges in the Hugging Face tensor.
        source, source_row, source_col: the sender's parameter and where the rectangle begins there.
        target, target_row, target_col: the receiver's.
    """

    tensor: str
    rows: tuple[int, int]
    cols: tuple[int, int]
    source: str
    source_row: int
    source_col: int
    target: str
    target_row: int
    target_col: int

    @property
    def height(self) -> int:
        return self.rows[1] - self.rows[0]

    @property
    def width(self) -> int:
        return self.cols[1] - self.cols[0]

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.height * self.width

    def part(self, begin: int, end: int) -> "Slice":
        """Rows [begin, end) of this slice, counted from its first."""
        return replace(
            self,
            rows=(self.rows[0] + begin, self.rows[0] + end),
            source_row=self.source_row + begin,
            target_row=self.target_row + begin,
        )

    def __str__(self) -> str:
        return f"{self.tensor}[{self.rows[0]}:{self.rows[1]}, {self.cols[0]}:{self.cols[1]}]"


Message = tuple[Slice, ...]


@dataclass(frozen=True, kw_only=True)
class TransferPlan:
    """All messages of one push.

    Attributes:
        streams: (learner rank, generator worker) -> messages, in that order of pairs; the k-th message of every stream moves in round k.
        dtype: of every element on the wire, torch's name without the prefix.
        senders, receivers: number of learner ranks, and of workers of one replica.
    """

    streams: dict[tuple[int, int], tuple[Message, ...]]
    dtype: str
    senders: int
    receivers: int

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]

    @cached_property
    def num_bytes(self) -> int:
        """Bytes one replica receives."""
        elements = sum(s.size for messages in self.streams.values() for message in messages for s in message)
        return elements * self.item_bytes

    def outgoing(self, sender: int) -> list[list[tuple[int, Message]]]:
        """A sender's rounds, each (receiver, message) by receiver."""
        return _by_round({r: messages for (s, r), messages in self.streams.items() if s == sender})

    def incoming(self, receiver: int) -> list[list[tuple[int, Message]]]:
        """A receiver's rounds, each (sender, message) by sender: the order in its buffer."""
        return _by_round({s: messages for (s, r), messages in self.streams.items() if r == receiver})

    def sent_by(self, sender: int) -> list[Slice]:
        """All slices of a sender: receiver by receiver, in sending order."""
        return [s for (a, _), messages in self.streams.items() if a == sender for m in messages for s in m]

    def received_by(self, receiver: int) -> list[Slice]:
        """All slices of a receiver: sender by sender, in sending order."""
        return [s for (_, b), messages in self.streams.items() if b == receiver for m in messages for s in m]

    @cached_property
    def fingerprint(self) -> str:
        """Equal on two ranks only if they would move the same bytes to the same places."""
        text = repr((self.dtype, self.senders, self.receivers, self.streams))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _by_round(messages_of: dict[int, tuple[Message, ...]]) -> list[list[tuple[int, Message]]]:
    rounds = max((len(messages) for messages in messages_of.values()), default=0)
    return [[(peer, m[k]) for peer, m in messages_of.items() if k < len(m)] for k in range(rounds)]


def plan_transfer(
    arch: Architecture, learner: LearnerLayout, tensor_parallel: int, *, dtype: str, staging_bytes: int
) -> TransferPlan:
    """The plan from a learner layout to one generator replica of `tensor_parallel` workers.

    Raises:
        ConfigError: a single row of a tensor does not fit the staging buffer.
        MappingError: a layout that cannot hold the model.
    """
    senders = [learner_pieces(arch, learner, rank) for rank in range(learner.ranks)]
    receivers = [generator_pieces(arch, tensor_parallel, rank) for rank in range(tensor_parallel)]
    slices = _assign(senders, receivers, ITEM_BYTES[dtype])
    return TransferPlan(
        streams=_pack(slices, ITEM_BYTES[dtype], staging_bytes),
        dtype=dtype,
        senders=learner.ranks,
        receivers=tensor_parallel,
    )


def configured_transfer(config: RunConfig, arch: Architecture) -> TransferPlan:
    """The plan of a run; raises what `plan_transfer` does."""
    return plan_transfer(
        arch,
        LearnerLayout.of(config.learner),
        config.generator.tensor_parallel,
        dtype=config.generator.dtype,
        staging_bytes=config.weights.staging_bytes,
    )


def _assign(
    senders: Sequence[Sequence[Piece]], receivers: Sequence[Sequence[Piece]], item_bytes: int
) -> dict[tuple[int, int], list[Slice]]:
    """Every receiver piece cut along the senders' rectangles, each part given to one of its holders."""
    holders = _holders(senders)
    load = [0] * len(senders)
    assigned: dict[tuple[int, int], list[Slice]] = defaultdict(list)
    for receiver, pieces in enumerate(receivers):
        for piece in pieces:
            covered = 0
            for by_rank in holders[piece.tensor].values():
                ranks = sorted(by_rank)
                overlap = _intersect(by_rank[ranks[0]], piece)
                if overlap is None:
                    continue
                covered += overlap.size
                for sender, part in _share(overlap, ranks, load, item_bytes):
                    source = _intersect(by_rank[sender], piece)
                    assert source is not None  # its rectangle is that of `ranks[0]`
                    begin = part.rows[0] - source.rows[0]
                    assigned[sender, receiver].append(source.part(begin, begin + part.height))
                    load[sender] += part.size
            if covered != piece.size:
                raise MappingError(
                    f"{piece.tensor}: generator rank {receiver} needs {piece.size} elements of rows {piece.rows}, the "
                    f"learner's ranks offer {covered}; the two layouts do not describe the same model"
                )
    return assigned


def _holders(senders: Sequence[Sequence[Piece]]) -> dict[str, dict[tuple, dict[int, Piece]]]:
    """tensor -> rectangle -> rank -> its piece; ranks that hold the same rectangle may each send it."""
    holders: dict[str, dict[tuple, dict[int, Piece]]] = defaultdict(lambda: defaultdict(dict))
    for rank, pieces in enumerate(senders):
        for piece in pieces:
            holders[piece.tensor][piece.rows, piece.cols].setdefault(rank, piece)
    return holders


def _intersect(source: Piece, target: Piece) -> Slice | None:
    rows = max(source.rows[0], target.rows[0]), min(source.rows[1], target.rows[1])
    cols = max(source.cols[0], target.cols[0]), min(source.cols[1], target.cols[1])
    if rows[0] >= rows[1] or cols[0] >= cols[1]:
        return None
    return Slice(
        tensor=source.tensor,
        rows=rows,
        cols=cols,
        source=source.parameter,
        source_row=source.row + rows[0] - source.rows[0],
        source_col=source.col + cols[0] - source.cols[0],
        target=target.parameter,
        target_row=target.row + rows[0] - target.rows[0],
        target_col=target.col + cols[0] - target.cols[0],
    )


def _share(overlap: Slice, ranks: list[int], load: list[int], item_bytes: int) -> Iterator[tuple[int, Slice]]:
    """Which holder sends which rows."""
    parts = len(ranks) if overlap.size * item_bytes >= _WORTH_DIVIDING_BYTES else 1
    parts = min(parts, overlap.height)
    if parts == 1:
        yield min(ranks, key=lambda rank: (load[rank], rank)), overlap
        return
    for index, rank in enumerate(ranks[:parts]):
        yield rank, overlap.part(overlap.height * index // parts, overlap.height * (index + 1) // parts)


def _pack(
    assigned: dict[tuple[int, int], list[Slice]], item_bytes: int, staging_bytes: int
) -> dict[tuple[int, int], tuple[Message, ...]]:
    """Streams of messages so small that all of a rank's messages of one round fit one staging buffer."""
    out_degree: dict[int, int] = defaultdict(int)
    in_degree: dict[int, int] = defaultdict(int)
    for sender, receiver in assigned:
        out_degree[sender] += 1
        in_degree[receiver] += 1
    return {
        (sender, receiver): _messages(
            slices, staging_bytes // max(out_degree[sender], in_degree[receiver]) // item_bytes, staging_bytes
        )
        for (sender, receiver), slices in sorted(assigned.items())
    }


def _messages(slices: Sequence[Slice], limit: int, staging_bytes: int) -> tuple[Message, ...]:
    """Slices in order, cut by rows so that a message holds at most `limit` elements."""
    messages: list[list[Slice]] = [[]]
    room = limit
    for whole in slices:
        if whole.width > limit:
            raise ConfigError(
                f"weights.staging_mib = {staging_bytes / 2**20:g}: one row of {whole.tensor} ({whole.width} elements) "
                f"does not fit the {limit} elements a rank may send to each of its peers; raise it"
            )
        begin = 0
        while begin < whole.height:
            rows = min(room // whole.width, whole.height - begin)
            if rows == 0:
                messages.append([])
                room = limit
                continue
            messages[-1].append(whole.part(begin, begin + rows))
            room -= rows * whole.width
            begin += rows
    return tuple(tuple(message) for message in messages)
