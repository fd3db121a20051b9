"""A rollout's samples on their way from rank 0 to the ranks that train on them, a piece at a time.

Rank 0 plans the micro-batches of all ranks, because planning takes longer than sending. No rank ever holds more than its own
samples and one piece.
"""

from collections.abc import Callable, Sequence
from itertools import islice

import numpy as np
import torch
import torch.distributed as dist

from megatron_async_rlhf.learner.megatron.parallel import Placement
from megatron_async_rlhf.learner.megatron.plain_values import from_rank, of_all_ranks
from megatron_async_rlhf.learner.megatron.training.batching import Prompts, plan_micro_batches
from megatron_async_rlhf.learner.protocol import RolloutHeader
from megatron_async_rlhf.learner.rollout import Parcel, Rollout, Samples, joined, pieces, sampled_rows

_Plan = list[list[list[int]]]  # a mini-batch's units by data-parallel rank and micro-batch


def receive_rollout(
    header: RolloutHeader, next_piece: Callable[[], bytes], placement: Placement, *, unit: int, budget: int, share: bool
) -> Rollout:
    """This rank's part of the rollout. Collective.

    Args:
        next_piece: the next of the rollout's messages; called on rank 0 only.
        unit, budget: see `plan_micro_batches`.
        share: see `cut_micro_batches`.
    """
    plans = _planned(header, placement, unit, budget, share)
    mini_batches = _without_samples(header, [plan[placement.data_rank] for plan in plans])
    owners = _owners(plans, mini_batches, unit)
    firsts = np.cumsum([0, *map(len, mini_batches)])
    data_ranks = of_all_ranks(placement.data_rank, int, placement.control)
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
        for data_rank in range(placement.data_parallel) if placement.rank == 0 else [placement.data_rank]:
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
            else:
                buffer = torch.empty(parcel.size, dtype=torch.uint8)
                dist.recv(buffer, 0, group=placement.control)
                keep(parcel, buffer.numpy())
    return Rollout(
        id=header.id,
        version=header.version,
        epochs=header.epochs,
        mini_batches=mini_batches,
    )


def _planned(header: RolloutHeader, placement: Placement, unit: int, budget: int, share: bool) -> list[_Plan]:
    """The plan of every mini-batch, which rank 0 makes. Collective."""
    plans: list[_Plan] = []
    if placement.rank == 0:
        parts = (_by_mini_batch(header, values) for values in (header.lengths, header.prompt_lengths))
        plans = [
            plan_micro_batches(lengths, unit, budget, placement, Prompts(prompts, sizes) if share else None)
            for lengths, prompts, sizes in zip(*parts, header.groups, strict=True)
        ]
    return from_rank(0, plans, list[_Plan], placement.control)


def _without_samples(header: RolloutHeader, bins: Sequence[list[list[int]]]) -> list[Samples]:
    """What the header says of each mini-batch, and this rank's part of its plan."""
    rewards = iter(header.rewards)
    return [
        Samples(
            rewards=[list(islice(rewards, size)) for size in sizes],
            lengths=lengths,
            prompt_lengths=prompts,
            are_sampled=sampled,
            bins=own,
        )
        for sizes, lengths, prompts, sampled, own in zip(
            header.groups,
            _by_mini_batch(header, header.lengths),
            _by_mini_batch(header, header.prompt_lengths),
            header.sampled,
            bins,
            strict=True,
        )
    ]


def _by_mini_batch(header: RolloutHeader, values: Sequence[int]) -> list[list[int]]:
    """What has one value for each sample of all mini-batches."""
    rest = iter(values)
    return [list(islice(rest, sum(sizes))) for sizes in header.groups]


def _owners(plans: Sequence[_Plan], mini_batches: Sequence[Samples], unit: int) -> list[int]:
    """The data-parallel rank of each sample of all mini-batches."""
    owners: list[int] = []
    for plan, samples in zip(plans, mini_batches, strict=True):
        of_unit = {u: rank for rank, bins in enumerate(plan) for units in bins for u in units}
        owners += [of_unit[sample // unit] for sample in range(len(samples))]
    return owners
