"""What one optimizer step learns from, as one rank has it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_async_rlhf.errors import LearnerError
from megatron_async_rlhf.learner.megatron.parallel import Placement
from megatron_async_rlhf.learner.megatron.training.batching import MicroBatch, cut_micro_batches
from megatron_async_rlhf.learner.megatron.training.steps import sum_over_replicas
from megatron_async_rlhf.learner.rollout import Samples


@dataclass(frozen=True, kw_only=True)
class MiniBatch:
    """The groups of one step and this rank's micro-batches of them.

    Attributes:
        rewards: of each group's samples, float64. Micro-batches know samples by their place in all of them.
        num_sequences: over all ranks: the denominator of means over sequences.
        num_tokens: completion tokens over all ranks, at least 1: the denominator of means over tokens.
    """

    rewards: list[list[float]]
    num_sequences: int
    batches: list[MicroBatch]
    num_tokens: int
    placement: Placement

    @property
    def flat_rewards(self) -> torch.Tensor:
        """Of all samples, one group after the other, float64."""
        return torch.tensor([reward for group in self.rewards for reward in group], dtype=torch.float64)

    @property
    def here(self) -> list[MicroBatch]:
        """The micro-batches where losses are computed: on the last stage; none elsewhere."""
        return self.batches if self.placement.is_last_stage else []

    def sum_over_ranks(self, part_of: Callable[[MicroBatch], torch.Tensor], size: int) -> torch.Tensor:
        """Sum of `part_of` all micro-batches of all ranks, float64 [size], on every rank's host. Collective."""
        totals = torch.zeros(size, dtype=torch.float64)
        for batch in self.here:
            totals += part_of(batch).double().cpu()
        return sum_over_replicas(totals, self.placement)

    def sum_completions(self, values_of: Callable[[MicroBatch], torch.Tensor]) -> torch.Tensor:
        """Sum over each sequence's completion tokens, by its index, float64, on every rank's host. Collective.

        Args:
            values_of: a micro-batch's values, [T].
        """

        def by_index(batch: MicroBatch) -> torch.Tensor:
            sums_S = batch.completions.sum(values_of(batch)).double().cpu()
            sums = torch.zeros(self.num_sequences, dtype=torch.float64)
            return sums.index_add(0, torch.tensor(batch.indices).clamp(min=0), sums_S)  # no real one: adds 0

        return self.sum_over_ranks(by_index, self.num_sequences)


def make_mini_batch(
    samples: Samples, placement: Placement, *, together: int, budget: int, needs_sampler: bool, share: bool = False
) -> MiniBatch:
    """Cut the samples into micro-batches, with the sampler's log-probabilities if all bring them.

    Args:
        together, budget, share: see `cut_micro_batches`.

    Raises:
        LearnerError: the sampler's log-probabilities are needed, and a sequence lacks them.
    """
    batches = cut_micro_batches(samples, together, budget, placement, share=share)
    if samples.are_sampled:
        for batch in batches:
            batch.sampler_T = batch.lay_completions(samples.sampler_logprobs)
    elif needs_sampler:
        raise LearnerError(
            "TrainRollout lacks the sampler's log-probabilities of some completion tokens, which algorithm.correction or "
            "algorithm.ratio_base = sampler needs"
        )
    return MiniBatch(
        rewards=samples.rewards,
        num_sequences=len(samples),
        batches=batches,
        num_tokens=max(1, samples.completion_tokens),
        placement=placement,
    )
