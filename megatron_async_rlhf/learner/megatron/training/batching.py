"""From sequences to this rank's micro-batches: one row of tokens each, sequences one after another.

A *unit* is what a loss needs together: one sequence, or a preference pair (two). `data.packing` plans which units
share a micro-batch. Attention, rotary angles and sums tell the sequences of a row apart by where they end, which
`PackedSeqParams` says in the form that Megatron and Transformer Engine know (THD). Where sequences share a prompt (see
`pieces`), a row is made of their pieces, and `PackedRow` says which keys each piece attends to.
Shape legend: T tokens, S sequences.
"""

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch

from megatron_async_rlhf.algorithms.segments import Segments
from megatron_async_rlhf.data.packing import plan_bins
from megatron_async_rlhf.learner.megatron.context import share_of_rank
from megatron_async_rlhf.learner.megatron.layers.packed_row import PackedRow
from megatron_async_rlhf.learner.megatron.parallel import Placement
from megatron_async_rlhf.learner.megatron.training.pieces import (
    Piece,
    Row,
    group_blocks,
    positions_of,
    share_prompts,
    whole,
)
from megatron_async_rlhf.learner.rollout import Samples


@dataclass(kw_only=True)
class MicroBatch:
    """One forward-backward pass.

    Attributes:
        tokens_T: inputs, [T].
        targets_T: the next token of the same sequence at each position, [T].
        mask_T: True where the target is a completion token, [T].
        segments_T: which sequence of the micro-batch each position belongs to; S for padding and shared prompts, [T].
        local_positions_T: positions that this rank computes, all unless context-parallel ranks divide them, [T / ranks].
        packed: where each sequence, or piece of one, and the padding ends.
        indices: which sequence of the command each one is, the parts of a unit in order; -1 for a sequence that only
            keeps ranks in step, [S].
        num_tokens: positions that hold a token of the command.

    The rest is known on the last stage only, once it is known, 0 off completion tokens:

    Attributes:
        sampler_T, reference_T: log-probabilities of the policy that sampled and of the reference policy, [T].
        proximal_T: the policy's before the first update of the rollout, if a pass of its own computes them, [T].
        policy_T: the policy's as the latest training pass computed them, before its update, [T].
        values_T, returns_T: of the value model before the first update, and its targets, [T].
        advantages_T, advantages_S: of each token, [T], or of each sequence, [S].
    """

    tokens_T: torch.Tensor
    targets_T: torch.Tensor
    mask_T: torch.Tensor
    segments_T: torch.Tensor
    local_positions_T: torch.Tensor
    packed: PackedRow
    indices: list[int]
    num_tokens: int
    sampler_T: torch.Tensor | None = None
    reference_T: torch.Tensor | None = None
    proximal_T: torch.Tensor | None = None
    policy_T: torch.Tensor | None = None
    values_T: torch.Tensor | None = None
    returns_T: torch.Tensor | None = None
    advantages_T: torch.Tensor | None = None
    advantages_S: torch.Tensor | None = None

    @cached_property
    def is_real_S(self) -> torch.Tensor:
        """False for a sequence that only keeps ranks in step, bool [S]."""
        return torch.tensor([index >= 0 for index in self.indices], device=self.mask_T.device)

    @property
    def completions(self) -> Segments:
        """Sums and means over each sequence's completion tokens."""
        return Segments(mask_T=self.mask_T, segments_T=self.segments_T, count=len(self.indices))

    def split_completions(self, values_T: torch.Tensor) -> dict[int, list[float]]:
        """Each sequence's values on its completion tokens in order, by its index in the command."""
        rows: list[list[float]] = [[] for _ in self.indices]
        owners, values = self.segments_T[self.mask_T].tolist(), values_T[self.mask_T].tolist()
        for owner, value in zip(owners, values, strict=True):
            rows[owner].append(value)
        return {index: row for index, row in zip(self.indices, rows, strict=True) if index >= 0}

    def lay_completions(self, rows: Mapping[int, np.ndarray]) -> torch.Tensor:
        """The inverse of `split_completions`, of float32 by the index of a sequence: 0 off completion tokens, [T]."""
        in_order = self.segments_T[self.mask_T].unique_consecutive().tolist()
        row_T = torch.zeros(len(self.mask_T), device=self.mask_T.device)
        if values := [rows[self.indices[owner]] for owner in in_order]:
            row_T[self.mask_T] = torch.from_numpy(np.concatenate(values)).to(self.mask_T.device)
        return row_T

    def pick(self, values: torch.Tensor) -> torch.Tensor:
        """Of one number per sequence of the command those of this micro-batch's, 0 for one that is not real, [S]."""
        values_S = values[torch.tensor(self.indices).clamp(min=0)].float().to(self.mask_T.device)
        return values_S.where(self.is_real_S, 0)

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on a device."""
        if device.type == "cpu":
            return self
        moved = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        return replace(self, **moved, packed=self.packed.to(device))


def plan_micro_batches(
    lengths: Seq[int], unit: int, budget: int, placement: Placement, prompts: "Prompts | None" = None
) -> list[list[list[int]]]:
    """Which units share a micro-batch, by data-parallel rank and micro-batch.

    Args:
        lengths: tokens of each sequence.
        unit: sequences that must stay together, neighbours.
        budget: most tokens of a micro-batch, beside what makes them divisible over ranks; a longer unit goes alone.
        prompts: given if a micro-batch computes a prompt once; its sequences then go together as far as the budget allows.
    """
    if prompts is None:
        positions = [_rounded(positions_of(length), placement) for length in lengths]
        return plan_bins(
            [sum(positions[i : i + unit]) for i in range(0, len(positions), unit)], budget, placement.data_parallel
        )
    blocks, totals = group_blocks(lengths, prompts.lengths, prompts.groups, unit, budget)
    plan = plan_bins(totals, budget, placement.data_parallel)
    return [[[u for b in chosen for u in blocks[b]] for chosen in of_rank] for of_rank in plan]


class Prompts(NamedTuple):
    """Of the sequences of a mini-batch: tokens of each one's prompt, and how many neighbours have the same one."""

    lengths: Seq[int]
    groups: Seq[int]


def cut_micro_batches(
    samples: Samples, unit: int, budget: int, placement: Placement, *, share: bool = False
) -> list[MicroBatch]:
    """This rank's micro-batches: at least one and as many as every rank has, so that all collectives are met.

    Args:
        unit, budget: see `plan_micro_batches`; needed again where `samples` come with their bins.
        share: compute a prompt that several sequences of a micro-batch have once.
    """
    bins = samples.bins
    if bins is None:
        prompts = Prompts(samples.prompt_lengths, [len(group) for group in samples.rewards]) if share else None
        if prompts and sum(prompts.groups) != len(samples):  # samples without rewards say nothing of groups
            prompts = None
        bins = plan_micro_batches(samples.lengths, unit, budget, placement, prompts)[placement.data_rank]
    groups = [[i for u in sorted(units) for i in range(u * unit, (u + 1) * unit)] for units in bins]
    groups += [[]] * (-len(groups) % placement.batch_multiple)
    laid = []
    for group in groups:
        rows = [_row(samples, i) for i in group] or [_NOTHING] * unit
        pieces = share_prompts(rows) if share and group else whole(rows)
        laid.append((rows, group or [-1] * unit, pieces))
    width = 0
    if placement.virtual_stages > 1:  # interleaved stages exchange tensors of one shape, see `model`
        width = max(sum(_rounded(piece.length, placement) for piece in pieces) for _, _, pieces in laid)
    return [_lay(rows, indices, pieces, width, placement).to(placement.device) for rows, indices, pieces in laid]


_NOTHING = Row(np.zeros(2, np.int32), 2)  # keeps ranks in step


def _row(samples: Samples, index: int) -> Row:
    return Row(samples.tokens[index], samples.prompt_lengths[index], samples.ignored.get(index, []))


def _rounded(positions: int, placement: Placement) -> int:
    """With those that pad a sequence so that each rank gets as many."""
    return positions + -positions % placement.sequence_multiple


def _lay(rows: Seq[Row], indices: list[int], pieces: Seq[Piece], width: int, placement: Placement) -> MicroBatch:
    """The pieces in a row, longest first: attention takes neighbours of one length together.

    Args:
        width: positions the row has at least.
    """
    order = sorted(range(len(pieces)), key=lambda p: (-pieces[p].length, -pieces[p].end))
    in_row = [_rounded(pieces[p].length, placement) for p in order]
    taken = sum(in_row)
    padding = max(width - taken, 0)
    padding += -(taken + padding) % placement.width_multiple
    if padding:
        in_row.append(padding)
    ends = [0, *accumulate(in_row)]
    tokens_T, targets_T, positions_T = (torch.zeros(ends[-1], dtype=torch.long) for _ in range(3))
    mask_T = torch.zeros(ends[-1], dtype=torch.bool)
    segments_T = torch.full((ends[-1],), len(rows))  # for padding and shared prompts
    for p, start, end in zip(order, ends, ends[1:], strict=False):
        piece, row = pieces[p], rows[pieces[p].row]
        ids = torch.from_numpy(row.token_ids.astype(np.int64))
        tokens_T[start : start + piece.length] = ids[piece.first : piece.end]
        positions_T[start:end] = torch.arange(piece.first, piece.first + end - start)
        if piece.is_shared:
            continue
        segments_T[start : start + piece.length] = piece.row
        targets = ids[piece.first + 1 : piece.end + 1]
        targets_T[start : start + len(targets)] = targets
        mask_T[start + max(row.prompt_length - 1 - piece.first, 0) : start + len(targets)] = True
        for first, last in row.ignored:
            mask_T[start + first - 1 - piece.first : start + last - 1 - piece.first] = False
    if padding:
        positions_T[ends[-2] :] = torch.arange(padding)
    local_T = share_of_rank(ends, placement.context_rank, placement.context_parallel)
    starts = dict(zip(order, ends, strict=False))
    return MicroBatch(
        tokens_T=tokens_T,
        targets_T=targets_T,
        mask_T=mask_T,
        segments_T=segments_T,
        local_positions_T=local_T,
        packed=PackedRow.of(
            ends,
            before=[_span(pieces, pieces[p].before, starts) for p in order],
            places_T=positions_T[local_T] if placement.device.type == "cpu" else None,
        ),
        indices=indices,
        num_tokens=sum(piece.length for piece in pieces if indices[piece.row] >= 0),
    )


def _span(pieces: Seq[Piece], number: int | None, starts: Mapping[int, int]) -> tuple[int, int] | None:
    """Where a piece lies in the row."""
    if number is None:
        return None
    return starts[number], starts[number] + pieces[number].length
