"""From completions to rewards."""

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from statistics import fmean

import numpy
from msgspec import Struct
from msgspec.structs import replace

from megatron_async_rlhf.algorithms.reward_shaping import soft_overlong_penalty
from megatron_async_rlhf.config.algorithm_keys import AlgorithmKeys
from megatron_async_rlhf.rewards.base import Reward
from megatron_async_rlhf.types import Completion, Prompt, RolloutGroup

_NO_SCORES = (
    "reward_penalised",
    "response_length",
    "finished",
)  # facts of a completion that are in its text and reward


class ScoredGroup(Struct, frozen=True, kw_only=True):
    """All samples of one prompt.

    Attributes:
        group: its `rewards` have the penalties for a missing end and for length in them.
        facts: of each completion: `reward` (the reward's own, no penalty) and the reward's metrics.
        failures: of completions for which the reward failed, and gave 0: what went wrong.
    """

    group: RolloutGroup
    facts: list[dict[str, float]]
    failures: list[str] = []

    @property
    def without_penalties(self) -> RolloutGroup:
        return replace(self.group, rewards=[fact["reward"] for fact in self.facts])

    @property
    def scores(self) -> list[dict[str, float]]:
        """What the reward said of each completion: its own value, and its metrics by part."""
        return [{name: value for name, value in fact.items() if name not in _NO_SCORES} for fact in self.facts]


async def score_group(
    prompt: Prompt, completions: list[Completion], reward: Reward, algorithm: AlgorithmKeys, max_new_tokens: int
) -> ScoredGroup:
    """Score every completion. One without an end-of-sequence token earns `missing_eos_reward` instead, if set.

    Raises:
        RewardError: the reward gave no usable scores.
    """
    rewards, facts = [], []
    scores = await reward.score(prompt, completions)
    for completion, score in zip(completions, scores, strict=True):
        value, length = score.reward, len(completion.token_ids)
        if algorithm.missing_eos_reward is not None and not completion.finished:
            value = algorithm.missing_eos_reward
        if algorithm.overlong_buffer is not None:
            value += soft_overlong_penalty(length, max_length=max_new_tokens, buffer=algorithm.overlong_buffer)
        rewards.append(value)
        facts.append(
            {
                "reward": score.reward,
                "reward_penalised": value,
                "response_length": float(length),
                "finished": float(completion.finished),
                **score.metrics,
            }
        )
    group = RolloutGroup(prompt=prompt, completions=completions, rewards=rewards)
    failures = [score.failure for score in scores if score.failure is not None]
    return ScoredGroup(group=group, facts=facts, failures=failures)


def mean_facts(scored: Iterable[ScoredGroup]) -> dict[str, float]:
    """Means over all completions of the groups that have the fact: before a resume `reward.on_error` may have been another."""
    facts = [fact for group in scored for fact in group.facts]
    names = dict.fromkeys(name for fact in facts for name in fact)
    return {name: fmean(fact[name] for fact in facts if name in fact) for name in names}


def mean_entropy(scored: Iterable[ScoredGroup]) -> float | None:
    """Of the sampler's distribution over the next token, nats, at the temperature it sampled with; None without tokens.

    Minus the mean log-probability of sampled tokens: its expectation is the mean entropy of the distributions they are from.
    """
    logprobs = [value for group in scored for completion in group.group.completions for value in completion.logprobs]
    return -fmean(logprobs) if logprobs else None


def logprob_gaps(completions: Seq[Completion], logprobs: Seq[list[float]], version: int) -> list[float]:
    """|learner - sampler| for each token that `version` sampled, given the learner's values under `version`."""
    gaps: list[float] = []
    for completion, row in zip(completions, logprobs, strict=True):
        if version in completion.versions:  # most are older as a whole
            ours, theirs = numpy.array([row, completion.logprobs])  # ValueError unless both have as many
            gaps += numpy.abs(ours - theirs)[numpy.array(completion.versions) == version].tolist()
    return gaps
