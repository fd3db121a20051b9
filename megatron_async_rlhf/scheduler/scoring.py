"""From completions to rewards, and from rewards to what the learner trains on."""

from collections.abc import Sequence as Seq
from statistics import fmean

from msgspec import Struct

from megatron_async_rlhf.algorithms.preference import best_and_worst
from megatron_async_rlhf.rewards.base import Reward
from megatron_async_rlhf.types import Completion, Prompt, RolloutGroup, Sequence, TrainingGroup


class ScoredBatch(Struct, frozen=True, kw_only=True):
    """The rollouts of one optimizer step.

    Attributes:
        groups: in prompt order; `rewards` have the missing-end penalty in them.
        metrics: means over all completions: `reward` (the verifier's own, no penalty) and the verifier's metrics.
    """

    groups: list[RolloutGroup]
    metrics: dict[str, float]


def score_batch(
    prompts: Seq[Prompt], completions: Seq[list[Completion]], reward: Reward, missing_eos_reward: float | None
) -> ScoredBatch:
    """Score every completion. One without an end-of-sequence token earns `missing_eos_reward` instead, if set."""
    groups = []
    facts: list[dict[str, float]] = []
    for prompt, samples in zip(prompts, completions, strict=True):
        scores = [reward.score(prompt, completion) for completion in samples]
        penalised = [
            missing_eos_reward if missing_eos_reward is not None and not completion.finished else score.reward
            for completion, score in zip(samples, scores, strict=True)
        ]
        groups.append(RolloutGroup(prompt=prompt, completions=samples, rewards=penalised))
        facts += [
            {
                "reward": score.reward,
                "reward_penalised": value,
                "response_length": float(len(completion.token_ids)),
                "finished": float(completion.finished),
                **score.metrics,
            }
            for completion, score, value in zip(samples, scores, penalised, strict=True)
        ]
    return ScoredBatch(groups=groups, metrics={name: fmean(fact[name] for fact in facts) for name in facts[0]})


class PreferencePairs(Struct, frozen=True, kw_only=True):
    """What of a batch is trained on.

    Attributes:
        completions: chosen and rejected alternating, [2 x num_pairs]; `sequences` are the same with their prompts.
        skipped: groups whose rewards were all equal.
        margin: mean reward of chosen minus rejected; 0 without pairs.
    """

    completions: list[Completion]
    sequences: list[Sequence]
    training: list[TrainingGroup]
    skipped: int
    margin: float


def make_pairs(groups: Seq[RolloutGroup]) -> PreferencePairs:
    """Best against worst completion of each group; ties are skipped."""
    completions: list[Completion] = []
    sequences: list[Sequence] = []
    training: list[TrainingGroup] = []
    margins: list[float] = []
    for group in groups:
        pair = best_and_worst(group.rewards)
        if pair is None:
            continue
        margins.append(group.rewards[pair[0]] - group.rewards[pair[1]])
        chosen = [group.completions[index] for index in pair]
        training.append(
            TrainingGroup(
                sequences=[as_sequence(group.prompt, completion) for completion in chosen],
                rewards=[group.rewards[index] for index in pair],
                sampler_logprobs=[completion.logprobs for completion in chosen],
            )
        )
        completions += chosen
        sequences += training[-1].sequences
    return PreferencePairs(
        completions=completions,
        sequences=sequences,
        training=training,
        skipped=len(groups) - len(margins),
        margin=fmean(margins) if margins else 0.0,
    )


def as_sequence(prompt: Prompt, completion: Completion) -> Sequence:
    """Prompt and completion as one row for the learner."""
    return Sequence(token_ids=prompt.token_ids + completion.token_ids, prompt_length=len(prompt.token_ids))


def logprob_gaps(completions: Seq[Completion], logprobs: Seq[list[float]], version: int) -> list[float]:
    """|learner - sampler| for each token that `version` sampled, given the learner's values under `version`."""
    return [
        abs(ours - theirs)
        for completion, row in zip(completions, logprobs, strict=True)
        for ours, theirs, sampled_by in zip(row, completion.logprobs, completion.versions, strict=True)
        if sampled_by == version
    ]
