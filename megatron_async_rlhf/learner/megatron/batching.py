"""From sequences to padded micro-batches for this rank.

A *unit* is what a loss needs together: one sequence, or a preference pair (two). Units are dealt to data-parallel
ranks in turn, sorted by length so that neighbours pad little, and cut so that a micro-batch stays within a
budget of padded tokens. Shape legend: B sequences, T tokens.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from megatron_async_rlhf.learner.megatron.parallel import Placement
from megatron_async_rlhf.types import Sequence


@dataclass(kw_only=True)
class MicroBatch:
    """One forward-backward pass.

    Attributes:
        tokens_BT: inputs, right-padded with 0, [B, T].
        targets_BT: the next token at each position, [B, T].
        mask_BT: 1 where the target is a completion token, [B, T].
        indices: which sequence of the command each row is; -1 for a row that only keeps ranks in step, [B].
        reference_BT: the reference policy's log-probabilities on the last stage, once known, [B, T].
        policy_BT: the policy's, as computed by the training pass before the update, likewise.
    """

    tokens_BT: torch.Tensor
    targets_BT: torch.Tensor
    mask_BT: torch.Tensor
    indices: list[int]
    reference_BT: torch.Tensor | None = None
    policy_BT: torch.Tensor | None = None


def cut_micro_batches(sequences: Seq[Sequence], unit: int, budget: int, placement: Placement) -> list[MicroBatch]:
    """This rank's micro-batches: at least one, so that every rank takes part in every collective.

    Args:
        unit: sequences that must stay together, adjacent in `sequences`.
        budget: most padded tokens of a micro-batch; a single unit may exceed it.
    """
    num_units = len(sequences) // unit
    mine = range(placement.data_rank, num_units, placement.data_parallel)
    length = {u: max(len(sequences[i].token_ids) for i in range(u * unit, (u + 1) * unit)) for u in mine}
    groups: list[list[int]] = []
    for u in sorted(mine, key=lambda u: (-length[u], u)):
        # Longest first: the first unit of a group fixes its padded length.
        if not groups or length[groups[-1][0]] * unit * (len(groups[-1]) + 1) > budget:
            groups.append([])
        groups[-1].append(u)
    batches = [[i for u in group for i in range(u * unit, (u + 1) * unit)] for group in groups]
    if not batches:
        return [_pad([Sequence(token_ids=[0, 0], prompt_length=2)] * unit, [-1] * unit, placement)]
    return [_pad([sequences[i] for i in batch], batch, placement) for batch in batches]


def _pad(rows: Seq[Sequence], indices: list[int], placement: Placement) -> MicroBatch:
    width = max(len(row.token_ids) for row in rows) - 1
    width += -width % placement.width_multiple
    tokens, targets = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width)
    for b, row in enumerate(rows):
        ids = torch.tensor(row.token_ids)
        n = len(ids) - 1
        tokens[b, :n], targets[b, :n] = ids[:-1], ids[1:]
        mask[b, row.prompt_length - 1 : n] = 1.0
    return MicroBatch(tokens_BT=tokens, targets_BT=targets, mask_BT=mask, indices=indices)
