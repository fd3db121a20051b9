"""From sequences to micro-batches for this rank, packed or padded.

A *unit* is what a loss needs together: one sequence, or a preference pair (two). Packed, a row holds several
sequences one after another and `data.packing` plans which; padded, a row holds one sequence and units are dealt to
data-parallel ranks in turn, sorted by length so that neighbours pad little. Both give the same `MicroBatch`, in which
`segments_BT` says whose token a position holds. Shape legend: B rows, T tokens, S sequences.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from megatron_async_rlhf.data.packing import lay_in_rows, plan_bins
from megatron_async_rlhf.learner.megatron.parallel import Placement
from megatron_async_rlhf.types import Sequence


@dataclass(kw_only=True)
class MicroBatch:
    """One forward-backward pass.

    Attributes:
        tokens_BT: inputs, 0 where a row has ended, [B, T].
        targets_BT: the next token of the same sequence at each position, [B, T].
        mask_BT: 1 where the target is a completion token, [B, T].
        positions_BT: of each token in its own sequence, [B, T].
        segments_BT: which sequence of the micro-batch each position belongs to; S where a row has ended, [B, T].
        indices: which sequence of the command each one is, the parts of a unit in order; -1 for a sequence that only
            keeps ranks in step, [S].
        reference_BT: the reference policy's log-probabilities on the last stage, once known, [B, T].
        policy_BT: the policy's, as computed by the training pass before the update, likewise.
    """

    tokens_BT: torch.Tensor
    targets_BT: torch.Tensor
    mask_BT: torch.Tensor
    positions_BT: torch.Tensor
    segments_BT: torch.Tensor
    indices: list[int]
    reference_BT: torch.Tensor | None = None
    policy_BT: torch.Tensor | None = None

    def sum_completions(self, values_BT: torch.Tensor) -> torch.Tensor:
        """Sum over each sequence's completion tokens, [S]; differentiable."""
        sums = values_BT.new_zeros(len(self.indices) + 1)  # the last one collects what comes after a row's end
        return sums.index_add(0, self.segments_BT.flatten(), (values_BT * self.mask_BT).flatten())[:-1]

    def split_completions(self, values_BT: torch.Tensor) -> dict[int, list[float]]:
        """Each sequence's values on its completion tokens in order, by its index in the command."""
        completions_BT = self.mask_BT.bool()
        rows: list[list[float]] = [[] for _ in self.indices]
        owners, values = self.segments_BT[completions_BT].tolist(), values_BT[completions_BT].tolist()
        for owner, value in zip(owners, values, strict=True):
            rows[owner].append(value)
        return {index: row for index, row in zip(self.indices, rows, strict=True) if index >= 0}

    def attention_mask(self) -> torch.Tensor | None:
        """True where a position must not look: ahead, or into another sequence, [B, 1, T, T].

        None where every row is one sequence: attention is causal by itself, and no token sees the padding after it.
        """
        if not self.has_packed_rows:
            return None
        apart_BTT = self.segments_BT.unsqueeze(2) != self.segments_BT.unsqueeze(1)
        ahead_TT = torch.ones(apart_BTT.shape[1:], dtype=torch.bool).triu(1)
        return (apart_BTT | ahead_TT).unsqueeze(1)

    @property
    def has_packed_rows(self) -> bool:
        return len(self.indices) > len(self.tokens_BT)

    @property
    def num_tokens(self) -> int:
        """Positions that hold a token of the command."""
        real_S = torch.tensor([index >= 0 for index in self.indices] + [False])
        return int(real_S[self.segments_BT].sum())


def cut_micro_batches(
    sequences: Seq[Sequence], unit: int, budget: int, placement: Placement, *, packing: bool, free_width: int
) -> list[MicroBatch]:
    """This rank's micro-batches: at least one, so that every rank takes part in every collective.

    Args:
        unit: sequences that must stay together, adjacent in `sequences`.
        budget: most tokens of a micro-batch; a single unit may exceed it. Padding counts too unless packing, where
            rows of unlike fill add some on top (13 % at the most seen).
        packing: put several sequences in a row.
        free_width: see `lay_in_rows`.
    """
    # A position predicts the next token, so the last token of a sequence needs none.
    lengths = [max(1, len(sequence.token_ids) - 1) for sequence in sequences]
    if packing:
        totals = [sum(lengths[u * unit : (u + 1) * unit]) for u in range(len(sequences) // unit)]
        groups = plan_bins(totals, budget, placement.data_parallel)[placement.data_rank]
    else:
        groups = _group_like_lengths(lengths, unit, budget, placement) or [[]]
    groups += [[]] * (-len(groups) % placement.batch_multiple)
    batches = []
    for group in groups:
        indices = [i for u in sorted(group) for i in range(u * unit, (u + 1) * unit)]
        if not indices:
            nothing = Sequence(token_ids=[0, 0], prompt_length=2)
            batches.append(_fill([nothing] * unit, [-1] * unit, [[i] for i in range(unit)], placement))
            continue
        rows = lay_in_rows([lengths[i] for i in indices], free_width) if packing else [[s] for s in range(len(indices))]
        batches.append(_fill([sequences[i] for i in indices], indices, rows, placement))
    return batches


def _group_like_lengths(lengths: Seq[int], unit: int, budget: int, placement: Placement) -> list[list[int]]:
    mine = range(placement.data_rank, len(lengths) // unit, placement.data_parallel)
    longest = {u: max(lengths[u * unit : (u + 1) * unit]) for u in mine}
    groups: list[list[int]] = []
    for u in sorted(mine, key=lambda u: (-longest[u], u)):
        # Longest first: the first unit of a group fixes its padded length.
        if not groups or longest[groups[-1][0]] * unit * (len(groups[-1]) + 1) > budget:
            groups.append([])
        groups[-1].append(u)
    return groups


def _fill(sequences: Seq[Sequence], indices: list[int], rows: list[list[int]], placement: Placement) -> MicroBatch:
    """Lay sequences one after another into rows of `rows[b]`."""
    width = max(sum(max(1, len(sequences[s].token_ids) - 1) for s in row) for row in rows)
    width += -width % placement.width_multiple
    shape = (len(rows), width)
    tokens, targets, positions = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
    segments, mask = torch.full(shape, len(sequences)), torch.zeros(shape)
    for b, row in enumerate(rows):
        start = 0
        for s in row:
            ids = torch.tensor(sequences[s].token_ids)
            end = start + len(ids) - 1
            tokens[b, start:end], targets[b, start:end] = ids[:-1], ids[1:]
            mask[b, start + sequences[s].prompt_length - 1 : end] = 1.0
            positions[b, start:end] = torch.arange(end - start)
            segments[b, start:end] = s
            start = end
    return MicroBatch(
        tokens_BT=tokens,
        targets_BT=targets,
        mask_BT=mask,
        positions_BT=positions,
        segments_BT=segments,
        indices=indices,
    )
