"""Which stretches of its sequences a micro-batch computes, and the prompts that several of them share.

The completions of a group have one prompt. With `learner.share_prompts` those in one micro-batch have it computed once:

    sequences   [prompt, completion a]  [prompt, completion b]
    pieces      [prompt but its last token]  [last token, completion a]  [last token, completion b]

The last token stays with each completion, whose first token it predicts. No loss is of the other tokens of a prompt, and what
a token's hidden state is depends on the tokens before it alone, so nothing else changes. Plain integers: no torch here.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Row(NamedTuple):
    """A sequence that is laid; `ignored` are the tokens behind the prompt that no loss is of."""

    token_ids: np.ndarray
    prompt_length: int
    ignored: list[tuple[int, int]] = []


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Neighbouring positions of one sequence; a position predicts the next token, so a sequence's last token has none.

    Attributes:
        row: the sequence; of a prompt that is shared, the first one with it.
        first, end: positions, from the sequence's start.
        before: the piece with the positions before `first`, by its place in the list; None if there are none.
        is_shared: it is the beginning of several sequences.
    """

    row: int
    first: int
    end: int
    before: int | None = None
    is_shared: bool = False

    @property
    def length(self) -> int:
        return self.end - self.first


def whole(rows: Iterable[Row]) -> list[Piece]:
    """Every sequence by itself."""
    return [Piece(row=r, first=0, end=positions_of(len(row.token_ids))) for r, row in enumerate(rows)]


def share_prompts(rows: Sequence[Row]) -> list[Piece]:
    """Prompts that several sequences begin with once, before what follows them; the others whole."""
    alike: dict[bytes, list[int]] = {}
    for r, row in enumerate(rows):
        alike.setdefault(row.token_ids[: row.prompt_length].tobytes(), []).append(r)
    pieces: list[Piece] = []
    for group in alike.values():
        shared = shared_positions(rows[group[0]].prompt_length, len(group))
        if shared:
            before: int | None = len(pieces)
            pieces.append(Piece(row=group[0], first=0, end=shared, is_shared=True))
        else:
            before = None
        ends = [positions_of(len(rows[r].token_ids)) for r in group]
        pieces += [
            Piece(row=r, first=shared, end=end, before=before)
            for r, end in zip(group, ends, strict=True)
            if end > shared  # an empty completion has nothing of its own
        ]
    return pieces


def positions_of(length: int) -> int:
    """Of a sequence of `length` tokens."""
    return max(1, length - 1)


def shared_positions(prompt_length: int, sequences: int) -> int:
    """How many positions so many sequences with one prompt share."""
    return max(0, prompt_length - 1) if sequences > 1 else 0


def group_blocks(
    lengths: Sequence[int], prompt_lengths: Sequence[int], groups: Sequence[int], unit: int, budget: int
) -> tuple[list[list[int]], list[int]]:
    """Units that go into one micro-batch together because they share a prompt, and the positions that each such block takes.

    Args:
        lengths, prompt_lengths: tokens of each sequence.
        groups: sequences of each group, neighbours; a multiple of `unit`.
        unit: sequences that must stay together, neighbours.
        budget: most positions of a block; a longer unit is one by itself.
    """
    blocks: list[list[int]] = []
    totals: list[int] = []
    first = 0
    for size in groups:
        shared = shared_positions(prompt_lengths[first], 2)
        for start in range(first, first + size, unit):
            own = sum(positions_of(lengths[s]) - shared for s in range(start, start + unit))
            if start > first and totals[-1] + own <= budget:
                blocks[-1].append(start // unit)
                totals[-1] += own
            else:
                blocks.append([start // unit])
                totals.append(shared + own)
        first += size
    return blocks, totals
