"""From scored groups to the mini-batches the learner trains on: which samples, with which rewards."""

from collections.abc import Sequence as Seq
from statistics import fmean

from msgspec import Struct

from megatron_async_rlhf.algorithms.reward_shaping import RewardMoments, scale_rewards
from megatron_async_rlhf.config.algorithm_keys import AlgorithmKeys
from megatron_async_rlhf.types import Completion, Prompt, RolloutGroup, Sequence, TrainingGroup


class TrainingBatch(Struct, frozen=True, kw_only=True):
    """What one optimizer step is made of.

    Attributes:
        groups: for the learner; those that teach nothing are left out.
        completions: of the samples in `groups`, in order.
        skipped: groups left out, because their rewards were all equal.
        margin: mean over `groups` of the best reward minus the worst, before scaling; 0 without groups.
    """

    groups: list[TrainingGroup]
    completions: list[Completion]
    skipped: int
    margin: float

    @property
    def tokens(self) -> int:
        """Completion tokens."""
        return sum(len(completion.token_ids) for completion in self.completions)


def select_training_samples(
    groups: Seq[RolloutGroup], algorithm: AlgorithmKeys, before: RewardMoments
) -> tuple[TrainingBatch, RewardMoments]:
    """Choose samples as the algorithm does, and scale rewards; also the moments of all rewards so far.

    Args:
        before: of the rewards of earlier mini-batches.
    """
    rewards = [reward for group in groups for reward in group.rewards]
    moments = before.including(rewards)
    whole = RewardMoments().including(rewards) if algorithm.reward_scale == "batch" else moments
    training, completions, margins = [], [], []
    for group in groups:
        chosen = algorithm.chosen_samples(group.rewards)
        if not chosen:
            continue
        samples = [group.completions[i] for i in chosen]
        shaped = group.rewards
        if algorithm.reward_scale != "none":
            shaped = scale_rewards(group.rewards, whole, shift=False)
        training.append(
            TrainingGroup(
                sequences=[as_sequence(group.prompt, completion) for completion in samples],
                rewards=[shaped[i] for i in chosen],
                sampler_logprobs=[completion.logprobs for completion in samples],
            )
        )
        completions += samples
        margins.append(max(group.rewards) - min(group.rewards))
    batch = TrainingBatch(
        groups=training,
        completions=completions,
        skipped=len(groups) - len(training),
        margin=fmean(margins) if margins else 0.0,
    )
    return batch, moments


def as_sequence(prompt: Prompt, completion: Completion) -> Sequence:
    """Prompt and completion as one row for the learner."""
    return Sequence(token_ids=prompt.token_ids + completion.token_ids, prompt_length=len(prompt.token_ids))
