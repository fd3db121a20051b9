"""From answers, scores and log-probabilities to `eval.json` and `answers.jsonl`; docs/evaluation.md says what is in them."""

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import numpy as np
from msgspec import Struct, to_builtins

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.evaluation.bootstrap import Interval, Resampling
from megatron_async_rlhf.evaluation.divergence import Divergence, divergence
from megatron_async_rlhf.evaluation.length_control import length_controlled_win_rate
from megatron_async_rlhf.evaluation.pass_at_k import pass_at_k
from megatron_async_rlhf.evaluation.wins import win_rate, wins
from megatron_async_rlhf.jobs.evaluated_models import most_new_tokens, section_of
from megatron_async_rlhf.rewards.base import Score
from megatron_async_rlhf.telemetry.summary import installed_versions
from megatron_async_rlhf.types import Completion, Prompt

SCHEMA = 1
_EXACT = "exact"  # metric of a reward that knows right from wrong
_FAILED = "reward_failed"  # metric of a reward with `on_error: zero`


class Answers(Struct, frozen=True, kw_only=True):
    """Of one side to one prompt, [samples] each; a reference is a single one."""

    completions: list[Completion]
    scores: list[Score]


class EvaluatedPrompt(Struct, frozen=True, kw_only=True):
    """
    Attributes:
        theirs: what the policy's answers are compared with, if anything.
        reference: log-probabilities of the policy's answers under `eval.kl_to`, if it is set, [samples][tokens].
    """

    prompt: Prompt
    ours: Answers
    theirs: Answers | None = None
    reference: list[list[float]] | None = None


def evaluation_of(config: RunConfig, prompts: Sequence[EvaluatedPrompt]) -> dict[str, Any]:
    """The content of `eval.json`."""
    section = section_of(config)
    resampling = Resampling(confidence=section.confidence, resamples=section.bootstrap, seed=section.seed)
    title = section.judged_by or "weighted sum of reward"
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "policy": str(config.model.hf),
        "against": None if section.against is None else str(section.against),
        "judged_by": None if section.against is None else title,
        "kl_to": None if section.kl_to is None else str(section.kl_to),
        "prompts": len(prompts),
        "samples": section.samples,
        "temperature": section.temperature,
        "max_new_tokens": most_new_tokens(config),
        "confidence": section.confidence,
        "bootstrap": section.bootstrap,
        "seed": section.seed,
        "metrics": _means(_facts(config, [one.ours for one in prompts]), resampling)
        | _passes([one.ours for one in prompts], section.k, resampling),
    }
    if section.against is not None:
        content |= _comparison(config, prompts, resampling)
    if section.kl_to is not None:
        content["kl"] = _divergences(prompts, resampling)
    content["versions"] = installed_versions()
    return to_builtins(content)


def answer_lines(config: RunConfig, prompts: Sequence[EvaluatedPrompt]) -> list[dict[str, Any]]:
    """The lines of `answers.jsonl`, one for each prompt."""
    lines = []
    for one in prompts:
        line: dict[str, Any] = {"prompt": one.prompt.text, "index": one.prompt.index, "policy": _told(config, one.ours)}
        if one.theirs is not None:
            line["against"] = _told(config, one.theirs)
        if one.reference is not None:
            for answer, logprobs in zip(line["policy"], one.reference, strict=True):
                answer["kl_to_logprob"] = sum(logprobs)
        lines.append(line)
    return lines


def pair_lines(config: RunConfig, prompts: Sequence[EvaluatedPrompt]) -> list[dict[str, Any]]:
    """The lines of `pairs.jsonl`: of each prompt the sample with the highest score and that with the lowest.

    Samples that did not end are left out, because what a reward model learns from has an end, and those without a score,
    because a reward failed; so are prompts whose other samples all earned the same.
    """
    lines = []
    for one in prompts:
        scores = _deciding(config, one.ours)
        ended = [
            (score, completion.text)
            for score, whole, completion in zip(scores, one.ours.scores, one.ours.completions, strict=True)
            if completion.finished and completion.text.strip() and whole.failure is None
        ]
        if not ended:
            continue
        (best, chosen), (worst, rejected) = max(ended), min(ended)
        if best > worst and chosen.strip() != rejected.strip():
            prompt = to_builtins(one.prompt.messages)
            lines.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "margin": best - worst})
    return lines


def means(content: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The estimates alone, of each part of `eval.json` that has some: what summary.json says."""
    parts = {name: content.get(name, {}) for name in ("metrics", "against_metrics", "difference", "wins", "kl")}
    found = {
        name: {key: value["mean"] for key, value in part.items() if isinstance(value, dict)}
        for name, part in parts.items()
    }
    return {name: values for name, values in found.items() if values}


def _told(config: RunConfig, answers: Answers) -> list[dict[str, Any]]:
    return [
        {
            "text": completion.text,
            "finished": completion.finished,
            "response_length": len(completion.token_ids),
            "reward": score.reward,
            "scores": _parts(config, score),
            "logprob": sum(completion.logprobs) if completion.logprobs else None,
        }
        for completion, score in zip(answers.completions, answers.scores, strict=True)
    ]


def _parts(config: RunConfig, score: Score) -> dict[str, float]:
    """The score of each entry of `reward` by name, not weighted if there are several; then its metrics."""
    own = {} if len(config.rewards) > 1 else {f"reward/{config.rewards[0].title}": score.reward}
    return own | score.metrics


def _facts(config: RunConfig, answers: Sequence[Answers]) -> list[dict[str, float]]:
    """Means over the answers to each prompt.

    Answers that were scored before `reward.on_error` was set to `zero`, and the evaluation resumed, have no
    `reward_failed`: of these the reward had not failed.
    """
    facts = [_facts_of_prompt(config, one) for one in answers]
    failed = {name for fact in facts for name in fact if name.rpartition("/")[2] == _FAILED}
    return [fact | dict.fromkeys(sorted(failed - fact.keys()), 0.0) for fact in facts]


def _facts_of_prompt(config: RunConfig, answers: Answers) -> dict[str, float]:
    facts = [
        {
            "reward": score.reward,
            **_parts(config, score),
            "response_length": float(len(completion.token_ids)),
            "response_characters": float(len(completion.text)),
            "finished": float(completion.finished),
        }
        for completion, score in zip(answers.completions, answers.scores, strict=True)
    ]
    return {name: fmean(fact[name] for fact in facts) for name in facts[0]}


def _means(facts: Sequence[dict[str, float]], resampling: Resampling) -> dict[str, Interval]:
    return {name: resampling.mean([fact[name] for fact in facts]) for name in facts[0]}


def _passes(answers: Sequence[Answers], ks: Sequence[int], resampling: Resampling) -> dict[str, Interval]:
    """pass@k by each part of the reward that says which answers are right."""
    names = [name for name in answers[0].scores[0].metrics if name.rpartition("/")[2] == _EXACT]
    right = {name: np.array([[score.metrics[name] == 1 for score in one.scores] for one in answers]) for name in names}
    return {
        f"{name.removesuffix(_EXACT)}pass@{k}": resampling.mean(pass_at_k(right[name], k)) for name in names for k in ks
    }


def _comparison(
    config: RunConfig, prompts: Sequence[EvaluatedPrompt], resampling: Resampling
) -> dict[str, dict[str, Any]]:
    """The n-th answer of one side meets the n-th of the other; a reference meets all."""
    pairs = [(one.ours, one.theirs) for one in prompts if one.theirs is not None]
    facts = _facts(config, [*(left for left, _ in pairs), *(right for _, right in pairs)])
    ours, theirs = facts[: len(pairs)], facts[len(pairs) :]
    scores = np.array([_deciding(config, left) for left, _ in pairs])
    their_scores = np.broadcast_to(np.array([_deciding(config, right) for _, right in pairs]), scores.shape)
    outcomes = wins(scores, their_scores)
    lengths, their_lengths = ([fact["response_characters"] for fact in side] for side in (ours, theirs))
    return {
        "against_metrics": _means(theirs, resampling),
        "difference": {
            name: resampling.difference([fact[name] for fact in ours], [fact[name] for fact in theirs])
            for name in ours[0]
        },
        "wins": {
            "win_rate": win_rate(scores, their_scores, resampling),
            "length_controlled_win_rate": length_controlled_win_rate(
                outcomes.mean(axis=1), lengths, their_lengths, resampling
            ),
            "won": int((outcomes == 1).sum()),
            "tied": int((outcomes == 0.5).sum()),
            "lost": int((outcomes == 0).sum()),
        },
    }


def _deciding(config: RunConfig, answers: Answers) -> list[float]:
    """The score that says who wins, of each answer."""
    name = section_of(config).judged_by
    return [score.reward if name is None else _parts(config, score)[f"reward/{name}"] for score in answers.scores]


def _divergences(prompts: Sequence[EvaluatedPrompt], resampling: Resampling) -> dict[str, Interval]:
    of_prompts: list[list[Divergence]] = [
        [
            divergence(completion.logprobs, reference, len(one.prompt.token_ids))
            for completion, reference in zip(one.ours.completions, one.reference or [], strict=True)
        ]
        for one in prompts
    ]

    def of(value: Callable[[Divergence], float]) -> list[float]:
        return [fmean(value(answer) for answer in answers) for answers in of_prompts]

    k1, k3, tokens = of(lambda it: it.k1), of(lambda it: it.k3), of(lambda it: float(it.tokens))
    found = {"kl_k1": resampling.mean(k1), "kl_k3": resampling.mean(k3)}
    if min(tokens) > 0:  # else a resample may have none
        found |= {"kl_k1_per_token": resampling.ratio(k1, tokens), "kl_k3_per_token": resampling.ratio(k3, tokens)}
    return found | {
        "perplexity_per_response_token": resampling.mean(of(lambda it: it.perplexity_per_response_token)),
        "perplexity_over_prompt_and_response": resampling.mean(of(lambda it: it.perplexity_over_prompt_and_response)),
    }
