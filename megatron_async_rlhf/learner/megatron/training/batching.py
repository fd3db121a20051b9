"""From sequences to this rank's micro-batches: one row of tokens each, sequences one after another.

A *unit* is what a loss needs together: one sequence, or a preference pair (two). `data.packing` plans which units
share a micro-batch. Attention, rotary angles and sums tell the sequences of a row apart by where they end, which
`PackedSeqParams` says in the form that Megatron and Transformer Engine know (THD).
Shape legend: T tokens, S sequences.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import accumulate

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_async_rlhf.algorithms.segments import Segments
from megatron_async_rlhf.data.packing import plan_bins
from megatron_async_rlhf.learner.megatron.context import share_of_rank
from megatron_async_rlhf.learner.megatron.parallel import Placement
from megatron_async_rlhf.types import Sequence


@dataclass(kw_only=True)
class MicroBatch:
    """One forward-backward pass.

    Attributes:
        tokens_T: inputs, [T].
        targets_T: the next token of the same sequence at each position, [T].
        mask_T: True where the target is a completion token, [T].
        segments_T: which sequence of the micro-batch each position belongs to; S for padding, [T].
        local_positions_T: positions that this rank computes, all unless context-parallel ranks divide them, [T / ranks].
        packed: where each sequence, and the padding, ends.
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
    packed: PackedSeqParams
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

    def lay_completions(self, rows: Seq[Seq[float]]) -> torch.Tensor:
        """The inverse of `split_completions`, of all sequences of the command: 0 off completion tokens, [T]."""
        in_order = self.segments_T[self.mask_T].unique_consecutive().tolist()
        values = [value for owner in in_order for value in rows[self.indices[owner]]]
        row_T = torch.zeros(len(self.mask_T), device=self.mask_T.device)
        row_T[self.mask_T] = torch.tensor(values, device=self.mask_T.device)
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
        ends = self.packed.cu_seqlens_q.to(device, non_blocking=True)
        return replace(self, **moved, packed=replace(self.packed, cu_seqlens_q=ends, cu_seqlens_kv=ends))


def cut_micro_batches(sequences: Seq[Sequence], unit: int, budget: int, placement: Placement) -> list[MicroBatch]:
    """This rank's micro-batches: at least one and as many as every rank has, so that all collectives are met.

    Args:
        unit: sequences that must stay together, adjacent in `sequences`.
        budget: most tokens of a micro-batch, beside what makes them divisible over ranks; a longer unit goes alone.
    """
    lengths = [_positions(sequence, placement) for sequence in sequences]
    totals = [sum(lengths[first : first + unit]) for first in range(0, len(sequences), unit)]
    groups = [
        [i for u in sorted(units) for i in range(u * unit, (u + 1) * unit)]
        for units in plan_bins(totals, budget, placement.data_parallel)[placement.data_rank]
    ]
    groups += [[]] * (-len(groups) % placement.batch_multiple)
    nothing = [Sequence(token_ids=[0, 0], prompt_length=2)] * unit
    rows = [([sequences[i] for i in group] or nothing, group or [-1] * unit) for group in groups]
    width = 0
    if placement.virtual_stages > 1:  # interleaved stages exchange tensors of one shape, see `model`
        width = max(sum(_positions(sequence, placement) for sequence in row) for row, _ in rows)
    return [_lay(row, indices, width, placement).to(placement.device) for row, indices in rows]


def _positions(sequence: Sequence, placement: Placement) -> int:
    """A position predicts the next token, so the last token of a sequence needs none. Each rank gets as many."""
    needed = max(1, len(sequence.token_ids) - 1)
    return needed + -needed % placement.sequence_multiple


def _lay(sequences: Seq[Sequence], indices: list[int], width: int, placement: Placement) -> MicroBatch:
    """The sequences in a row, longest first: attention takes neighbours of one length together.

    Args:
        width: positions the row has at least.
    """
    lengths = [_positions(sequence, placement) for sequence in sequences]
    order = sorted(range(len(sequences)), key=lambda s: -lengths[s])
    tokens, targets, mask, segments = [], [], [], []
    for s in order:
        ids, prompt = sequences[s].token_ids, sequences[s].prompt_length
        used = max(1, len(ids) - 1)
        unused = lengths[s] - used
        tokens += ids[:used] + [0] * unused
        targets += (ids[1:] or [0]) + [0] * unused
        mask += [position >= prompt - 1 and len(ids) > 1 for position in range(used)] + [False] * unused
        segments += [s] * used + [len(sequences)] * unused
    in_row = [lengths[s] for s in order]
    padding = max(width - len(tokens), 0)
    padding += -(len(tokens) + padding) % placement.width_multiple
    if padding:
        in_row.append(padding)
    nowhere = len(sequences)
    segments += [nowhere] * padding
    ends = [0, *accumulate(in_row)]
    return MicroBatch(
        tokens_T=torch.tensor(tokens + [0] * padding),
        targets_T=torch.tensor(targets + [0] * padding),
        mask_T=torch.tensor(mask + [False] * padding),
        segments_T=torch.tensor(segments),
        local_positions_T=share_of_rank(ends, placement.context_rank, placement.context_parallel),
        packed=_packed(ends, longest=max(in_row)),
        indices=indices,
        num_tokens=sum(1 for s in segments if s != nowhere and indices[s] >= 0),
    )


def _packed(ends: list[int], longest: int) -> PackedSeqParams:
    ends_S = torch.tensor(ends, dtype=torch.int32)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends_S,
        cu_seqlens_kv=ends_S,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
