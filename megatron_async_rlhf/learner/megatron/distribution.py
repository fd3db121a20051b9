"""A rollout's samples on their way from rank 0 to the ranks that train on them, a piece at a time.

Rank 0 plans the micro-batches of all ranks, because planning takes longer than sending. No rank ever holds more than its own
samples and one piece.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist

from megatron_async_rlhf.learner.megatron.parallel import Placement
from megatron_async_rlhf.learner.megatron.training.batching import plan_micro_batches
from megatron_async_rlhf.learner.protocol import RolloutHeader
from megatron_async_rlhf.learner.rollout import Parcel, Rollout, Samples, joined, pieces, sampled_rows

_Plan = list[list[list[int]]]  # a mini-batch's units by data-parallel rank and micro-batch


def receive_rollout(
    header: RolloutHeader, next_piece: Callable[[], bytes], placement: Placement, *, unit: int, budget: int
) -> Rollout:
    """This rank's part of the rollout. Collective.

    Args:
        next_piece: the next of the rollout's messages; called on rank 0 only.
        unit, budget: see `plan_micro_batches`.
    """
    mini_batches = _without_samples(header)
    plans = _planned(mini_batches, placement, unit, budget)
    owners = _owners(plans, mini_batches, unit)
    firsts = np.cumsum([0, *map(len, mini_batches)])
    data_ranks: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(data_ranks, placement.data_rank, group=placement.control)
    sampled = sampled_rows(header)

    def keep(parcel: Parcel, raw: bytes | np.ndarray) -> None:
        for sample, tokens, logprobs in parcel.rows(raw):
            place = int(np.searchsorted(firsts, sample, side="right")) - 1
            mini_batch, number = mini_batches[place], sample - int(firsts[place])
            mini_batch.tokens[number] = tokens
            if sampled[sample]:
                mini_batch.sampler_logprobs[number] = logprobs

    for piece in pieces(header.lengths):
        if placement.rank == 0:
            rows = list(Parcel(piece, header, sampled).rows(next_piece()))
        for data_rank in range(placement.data_parallel):
            theirs = [sample for sample in piece if owners[sample] == data_rank]
            parcel = Parcel(theirs, header, sampled)
            if parcel.size == 0:
                continue
            if placement.rank == 0:
                raw = joined([row for row in rows if owners[row[0]] == data_rank])
                for rank, its in enumerate(data_ranks):
                    if its == data_rank and rank == 0:
                        keep(parcel, raw)
                    elif its == data_rank:
                        dist.send(torch.frombuffer(bytearray(raw), dtype=torch.uint8), rank, group=placement.control)
            elif placement.data_rank == data_rank:
                buffer = torch.empty(parcel.size, dtype=torch.uint8)
                dist.recv(buffer, 0, group=placement.control)
                keep(parcel, buffer.numpy())
    return Rollout(
        id=header.id,
        version=header.version,
        epochs=header.epochs,
        mini_batches=mini_batches,
    )


def _without_samples(header: RolloutHeader) -> list[Samples]:
    rewards, lengths, prompts = iter(header.rewards), iter(header.lengths), iter(header.prompt_lengths)
    mini_batches = []
    for sizes, sampled in zip(header.groups, header.sampled, strict=True):
        mini_batches.append(
            Samples(
                rewards=[[next(rewards) for _ in range(size)] for size in sizes],
                lengths=[next(lengths) for _ in range(sum(sizes))],
                prompt_lengths=[next(prompts) for _ in range(sum(sizes))],
                are_sampled=sampled,
                bins=[],
            )
        )
    return mini_batches


def _planned(mini_batches: Sequence[Samples], placement: Placement, unit: int, budget: int) -> list[_Plan]:
    """The plan of every mini-batch, which also gets this rank's part of it."""
    plans: list[list[_Plan]] = [[]]
    if placement.rank == 0:
        plans = [[plan_micro_batches(samples.lengths, unit, budget, placement) for samples in mini_batches]]
    dist.broadcast_object_list(plans, src=0, group=placement.control)
    for samples, plan in zip(mini_batches, plans[0], strict=True):
        assert samples.bins is not None  # see `_without_samples`
        samples.bins.extend(plan[placement.data_rank])
    return plans[0]


def _owners(plans: Sequence[_Plan], mini_batches: Sequence[Samples], unit: int) -> list[int]:
    """The data-parallel rank of each sample of all mini-batches."""
    owners: list[int] = []
    for plan, samples in zip(plans, mini_batches, strict=True):
        of_unit = {u: rank for rank, bins in enumerate(plan) for units in bins for u in units}
        owners += [of_unit[sample // unit] for sample in range(len(samples))]
    return owners
