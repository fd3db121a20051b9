import pytest

from megatron_async_rlhf.rewards.base import Score
from megatron_async_rlhf.scheduler.scoring import logprob_gaps, make_pairs, score_batch
from megatron_async_rlhf.types import Completion, Prompt

PROMPT = Prompt(index=0, text="p", token_ids=[5, 6], reference={})


class First:
    def check(self, prompt):
        pass

    def score(self, prompt, completion):
        return Score(reward=completion.token_ids[0] / 10 if completion.token_ids else 0.0, metrics={"seen": 1.0})


def completion(*token_ids, finished=True):
    return Completion(
        token_ids=list(token_ids),
        logprobs=[-0.5] * len(token_ids),
        versions=list(range(len(token_ids))),
        finished=finished,
        text="",
    )


def test_a_completion_without_an_end_earns_the_penalty_instead():
    samples = [completion(9, finished=False), completion(2)]
    kept = score_batch([PROMPT], [samples], First(), None)
    penalised = score_batch([PROMPT], [samples], First(), -1.0)
    assert kept.groups[0].rewards == [0.9, 0.2]
    assert penalised.groups[0].rewards == [-1.0, 0.2]
    assert penalised.metrics["reward"] == pytest.approx(0.55)
    assert penalised.metrics["reward_penalised"] == pytest.approx(-0.4)
    assert penalised.metrics["finished"] == 0.5
    assert penalised.metrics["seen"] == 1.0


def test_pairs_are_best_then_worst_and_ties_are_counted():
    samples = [[completion(3), completion(8, 1), completion()], [completion(4), completion(4, 4), completion(4)]]
    pairs = make_pairs(score_batch([PROMPT, PROMPT], samples, First(), None).groups)
    assert [s.token_ids for s in pairs.sequences] == [[5, 6, 8, 1], [5, 6]]
    assert [s.prompt_length for s in pairs.sequences] == [2, 2]
    assert (pairs.skipped, pairs.margin) == (1, 0.8)


def test_a_batch_of_ties_has_no_pairs():
    pairs = make_pairs(score_batch([PROMPT], [[completion(1), completion(1)]], First(), None).groups)
    assert (pairs.sequences, pairs.skipped, pairs.margin) == ([], 1, 0.0)


def test_gaps_are_taken_over_tokens_of_the_same_version_only():
    gaps = logprob_gaps([completion(1, 2), completion()], [[-0.25, -0.75], []], version=1)
    assert gaps == [0.25]
    assert logprob_gaps([completion(1)], [[-0.5]], version=3) == []
