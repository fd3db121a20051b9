"""A rollout on its way to the learner's ranks: packed arrays, in pieces, so that nobody holds what he does not train on.

    TrainRollout ──> header: sizes and rewards of all samples ──────────────> every rank
                 ──> pieces: tokens and the sampler's log-probabilities ──> rank 0 ──> the ranks that train on them

No torch: the controller makes the messages.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np

from megatron_async_rlhf.learner.protocol import Command, RolloutHeader, TrainRollout, encode_command
from megatron_async_rlhf.types import Sequence as Row
from megatron_async_rlhf.types import TrainingGroup

# Few enough that encoding a piece does not hold up the controller's event loop, enough that their number costs nothing.
TOKENS_IN_PIECE = 2**17
_TOKEN: np.dtype = np.dtype("<i4")
_LOGPROB: np.dtype = np.dtype("<f4")


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The samples that one optimizer step learns from, as one learner rank has them.

    Attributes:
        rewards: by group.
        lengths, prompt_lengths: tokens of each sample, with its prompt and of that, [samples].
        are_sampled: whether all have the sampler's log-probabilities of their completion tokens.
        ignored: of the samples that have some, the tokens behind the prompt that no loss is of.
        tokens, sampler_logprobs: of the samples that this rank trains on, by sample: [length], [length - prompt_length].
        bins: which units share a micro-batch, of this rank; None if that is to be planned.
    """

    rewards: list[list[float]]
    lengths: list[int]
    prompt_lengths: list[int]
    are_sampled: bool = False
    tokens: dict[int, np.ndarray] = field(default_factory=dict)
    ignored: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    sampler_logprobs: dict[int, np.ndarray] = field(default_factory=dict)
    bins: list[list[int]] | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def completion_tokens(self) -> int:
        """Those that a loss is of."""
        ignored = sum(end - start for parts in self.ignored.values() for start, end in parts)
        return sum(self.lengths) - sum(self.prompt_lengths) - ignored

    @classmethod
    def of_sequences(cls, sequences: Sequence[Row]) -> "Samples":
        """All of them, without rewards."""
        return cls(
            rewards=[],
            lengths=[len(row.token_ids) for row in sequences],
            prompt_lengths=[row.prompt_length for row in sequences],
            tokens={i: np.array(row.token_ids, _TOKEN) for i, row in enumerate(sequences)},
            ignored={i: row.ignored for i, row in enumerate(sequences) if row.ignored},
        )

    @classmethod
    def of_groups(cls, groups: Sequence[TrainingGroup]) -> "Samples":
        """All of them."""
        whole = cls.of_sequences([row for group in groups for row in group.sequences])
        logprobs = [row for group in groups for row in group.sampler_logprobs]
        return cls(
            rewards=[group.rewards for group in groups],
            lengths=whole.lengths,
            prompt_lengths=whole.prompt_lengths,
            are_sampled=_are_sampled(groups),
            tokens=whole.tokens,
            sampler_logprobs={i: np.array(row, _LOGPROB) for i, row in enumerate(logprobs)},
        )


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """What `TrainRollout` asks for, as one learner rank has it."""

    id: int = 0
    version: int
    epochs: int
    mini_batches: list[Samples]

    @classmethod
    def of(cls, command: TrainRollout) -> "Rollout":
        """With all samples here."""
        samples = [Samples.of_groups(groups) for groups in command.mini_batches]
        return cls(id=command.id, version=command.version, epochs=command.epochs, mini_batches=samples)


def messages(command: Command) -> Iterator[bytes]:
    """A command as it goes over the wire; more than one message only for a rollout."""
    if not isinstance(command, TrainRollout):
        yield encode_command(command)
        return
    groups = [group for mini_batch in command.mini_batches for group in mini_batch]
    rows = [row for group in groups for row in group.sequences]
    lengths = [len(row.token_ids) for row in rows]
    header = RolloutHeader(
        id=command.id,
        version=command.version,
        epochs=command.epochs,
        groups=[[len(group.sequences) for group in mini_batch] for mini_batch in command.mini_batches],
        sampled=[_are_sampled(mini_batch) for mini_batch in command.mini_batches],
        rewards=[reward for group in groups for reward in group.rewards],
        lengths=lengths,
        prompt_lengths=[row.prompt_length for row in rows],
    )
    yield encode_command(header)
    sampled = zip(command.mini_batches, header.sampled, strict=True)
    of_group = [(group, has) for mini_batch, has in sampled for group in mini_batch]
    logprobs = [
        row for group, has in of_group for row in (group.sampler_logprobs if has else [[]] * len(group.sequences))
    ]
    for piece in pieces(lengths):
        tokens = np.array([token for i in piece for token in rows[i].token_ids], _TOKEN)
        values = np.array([value for i in piece for value in logprobs[i]], _LOGPROB)
        yield tokens.tobytes() + values.tobytes()


def pieces(lengths: Sequence[int]) -> list[range]:
    """Neighbouring samples that travel together."""
    found, start, tokens = [], 0, 0
    for end, length in enumerate(lengths, start=1):
        tokens += length
        if tokens >= TOKENS_IN_PIECE or end == len(lengths):
            found.append(range(start, end))
            start, tokens = end, 0
    return found


def sampled_rows(header: RolloutHeader) -> list[bool]:
    """Whether each sample brings the sampler's log-probabilities."""
    return [sampled for sizes, sampled in zip(header.groups, header.sampled, strict=True) for _ in range(sum(sizes))]


class Parcel:
    """Some samples' bytes: all tokens, then all log-probabilities, in the order of the samples."""

    def __init__(self, samples: Sequence[int], header: RolloutHeader, sampled: Sequence[bool]) -> None:
        self._samples = samples
        self._tokens = [header.lengths[i] for i in samples]
        self._logprobs = [header.lengths[i] - header.prompt_lengths[i] if sampled[i] else 0 for i in samples]

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(self._tokens) * _TOKEN.itemsize + sum(self._logprobs) * _LOGPROB.itemsize

    def rows(self, raw: bytes | memoryview | np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Each sample with its tokens and log-probabilities, views into `raw`."""
        end = sum(self._tokens)
        tokens = np.frombuffer(raw, _TOKEN, end)
        logprobs = np.frombuffer(raw, _LOGPROB, sum(self._logprobs), end * _TOKEN.itemsize)
        token_ends, logprob_ends = accumulate(self._tokens), accumulate(self._logprobs)
        for sample, length, count, stop, last in zip(
            self._samples, self._tokens, self._logprobs, token_ends, logprob_ends, strict=True
        ):
            yield sample, tokens[stop - length : stop], logprobs[last - count : last]


def joined(rows: Sequence[tuple[int, np.ndarray, np.ndarray]]) -> bytes:
    """The inverse of `Parcel.rows`."""
    return b"".join([row[1].tobytes() for row in rows] + [row[2].tobytes() for row in rows])


def _are_sampled(groups: Sequence[TrainingGroup]) -> bool:
    rows = [row for group in groups for row in group.sequences]
    logprobs = [row for group in groups for row in group.sampler_logprobs]
    return [len(row.token_ids) - row.prompt_length for row in rows] == [len(row) for row in logprobs]
