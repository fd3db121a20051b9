"""The numbers of an evaluation against hand-computed ones, brute force and PyTorch."""

import itertools
import math

import numpy as np
import pytest
import torch

from megatron_async_rlhf.evaluation.bootstrap import Resampling
from megatron_async_rlhf.evaluation.divergence import divergence
from megatron_async_rlhf.evaluation.length_control import RIDGE, length_controlled_win_rate
from megatron_async_rlhf.evaluation.pass_at_k import pass_at_k
from megatron_async_rlhf.evaluation.wins import win_rate, wins

RESAMPLING = Resampling(resamples=4000)


def test_ties_count_half():
    assert wins([1.0, 0.0, 0.5, -2.0], [0.0, 1.0, 0.5, -2.0]).tolist() == [1.0, 0.0, 0.5, 0.5]
    found = win_rate([1.0, 0.0, 0.5, 3.0], [0.0, 1.0, 0.5, -2.0], RESAMPLING)
    assert (found.mean, found.n) == (0.625, 4)


def test_both_sides_together_win_everything():
    ours, theirs = np.random.default_rng(0).integers(0, 3, size=(2, 50))
    assert win_rate(ours, theirs, RESAMPLING).mean + win_rate(theirs, ours, RESAMPLING).mean == pytest.approx(1)


def test_the_interval_is_that_of_all_resamples_there_are():
    """Four prompts can be drawn in 256 ways; the exact quantiles lie on a grid of quarters."""
    values = [0.0, 1.0, 1.0, 3.0]
    means = [sum(drawn) / 4 for drawn in itertools.product(values, repeat=4)]
    found = Resampling(confidence=0.8, resamples=50_000).mean(values)
    assert (found.low, found.high) == tuple(np.quantile(means, (0.1, 0.9)))
    assert found.mean == 1.25


def test_of_many_prompts_the_interval_is_the_normal_one():
    values = np.random.default_rng(1).normal(size=400)
    found, error = RESAMPLING.mean(values), 1.959964 * values.std() / math.sqrt(400)
    assert found.low == pytest.approx(values.mean() - error, abs=0.1 * error)
    assert found.high == pytest.approx(values.mean() + error, abs=0.1 * error)


def test_a_seed_gives_the_same_interval_however_many_prompts_are_drawn_at_once(monkeypatch):
    values = np.random.default_rng(2).random(30)
    found = Resampling(resamples=1000, seed=5).mean(values)
    assert found == Resampling(resamples=1000, seed=5).mean(values)
    assert found != Resampling(resamples=1000, seed=6).mean(values)
    monkeypatch.setattr("megatron_async_rlhf.evaluation.bootstrap._DRAWN_AT_ONCE", 64)
    assert found == Resampling(resamples=1000, seed=5).mean(values)


def test_intervals_cover_as_often_as_they_say():
    """Of 300 samples from one population about 90 % have its mean in their interval: 5 standard errors are allowed."""
    draw = np.random.default_rng(3)
    intervals = [Resampling(confidence=0.9, resamples=400).mean(draw.random(60) < 0.3) for _ in range(300)]
    covered = sum(found.low <= 0.3 <= found.high for found in intervals) / 300
    assert covered == pytest.approx(0.9, abs=5 * math.sqrt(0.09 / 300))


def test_a_difference_pairs_the_prompts():
    """What makes a prompt hard for both is in neither's favour: here the difference is the same everywhere."""
    hard = np.random.default_rng(4).normal(scale=10.0, size=40)
    found = RESAMPLING.difference(hard + 0.5, hard)
    assert [found.mean, found.low, found.high] == pytest.approx([0.5, 0.5, 0.5])
    alone = RESAMPLING.mean(hard)
    assert alone.high - alone.low > 1


def test_a_ratio_is_of_sums():
    found = RESAMPLING.ratio([1.0, 3.0], [1.0, 9.0])
    assert found.mean == pytest.approx(0.4)  # and not (1 + 1/3) / 2
    assert (found.low, found.high) == (pytest.approx(1 / 3), 1.0)
    with pytest.raises(ValueError, match="above 0"):
        RESAMPLING.ratio([1.0], [0.0])


@pytest.mark.parametrize("values", [[], [[1.0, 2.0]], 1.0])
def test_one_value_for_each_prompt_is_needed(values):
    with pytest.raises(ValueError, match="one value for each"):
        RESAMPLING.mean(values)


@pytest.mark.parametrize(("n", "c"), [(1, 0), (1, 1), (5, 0), (5, 2), (6, 5), (7, 7)])
def test_pass_at_k_is_the_share_of_choices_with_a_right_answer(n, c):
    answers = [True] * c + [False] * (n - c)
    for k in range(1, n + 1):
        choices = [any(chosen) for chosen in itertools.combinations(answers, k)]
        assert pass_at_k([answers], k) == pytest.approx([sum(choices) / len(choices)])


def test_pass_at_1_is_the_share_of_right_answers_and_many_answers_are_no_problem():
    assert pass_at_k([[True, False, False, False], [True] * 4], 1).tolist() == [0.25, 1.0]
    (found,) = pass_at_k([[True] + [False] * 1999], 1000)
    assert found == pytest.approx(0.5)
    with pytest.raises(ValueError, match="pass@3 needs at least 3"):
        pass_at_k([[True, False]], 3)


def test_divergence_of_one_answer_by_hand():
    found = divergence([math.log(0.5), math.log(0.25)], [math.log(0.25), math.log(0.5)], prompt_tokens=6)
    assert found.k1 == pytest.approx(0.0)
    assert found.k3 == pytest.approx((0.5 - 1 + math.log(2)) + (2 - 1 - math.log(2)))
    assert found.perplexity_per_response_token == pytest.approx(math.sqrt(8))
    assert found.perplexity_over_prompt_and_response == pytest.approx(8 ** (1 / 8))
    assert divergence([], [], prompt_tokens=3).perplexity_per_response_token == 1.0
    with pytest.raises(ValueError, match="2 log-probabilities of the policy, 1 of the reference"):
        divergence([0.0, 0.0], [0.0], 1)


def test_both_estimators_estimate_the_divergence():
    """Samples of a known policy: the mean of either is sum p log(p/q), and k3 is the less scattered one."""
    policy, reference = np.array([0.5, 0.3, 0.2]), np.array([0.4, 0.4, 0.2])
    truth = float((policy * np.log(policy / reference)).sum())
    tokens = np.random.default_rng(5).choice(3, size=(20_000, 2), p=policy)
    answers = [divergence(np.log(policy[row]), np.log(reference[row]), 1) for row in tokens]
    k1, k3 = (np.array([getattr(answer, name) for answer in answers]) for name in ("k1", "k3"))
    for sums in (k1, k3):
        assert sums.mean() == pytest.approx(2 * truth, abs=5 * sums.std() / math.sqrt(len(sums)))
    assert k3.std() < k1.std()
    assert k3.min() >= 0


def test_the_length_controlled_win_rate_is_what_pytorch_fits():
    draw = np.random.default_rng(6)
    ours, theirs = draw.integers(20, 400, size=(2, 200)).astype(float)
    longer = np.tanh((ours - theirs) / (ours - theirs).std())
    won = (draw.random(200) < 1 / (1 + np.exp(-(0.4 + 1.5 * longer)))).astype(float)
    won[:10] = 0.5
    found = length_controlled_win_rate(won, ours, theirs, Resampling(resamples=200))
    coefficients = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([coefficients], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")
    feature, outcome = torch.tensor(longer), torch.tensor(won)

    def closure():
        optimizer.zero_grad()
        logits = coefficients[0] + coefficients[1] * feature
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, outcome, reduction="sum")
        loss = loss + RIDGE / 2 * (coefficients**2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert found.mean == pytest.approx(torch.sigmoid(coefficients[0]).item(), abs=1e-6)
    assert found.low < found.mean < found.high


def test_who_wins_by_length_alone_wins_half_under_length_control():
    draw = np.random.default_rng(7)
    ours, theirs = draw.integers(20, 400, size=(2, 1000)).astype(float)
    ours += 150
    difference = ours - theirs
    won = (draw.random(1000) < 1 / (1 + np.exp(-2 * np.tanh(difference / difference.std())))).astype(float)
    assert won.mean() > 0.65
    found = length_controlled_win_rate(won, ours, theirs, Resampling(resamples=100))
    assert found.low < 0.5 < found.high


def test_of_equal_lengths_it_is_the_win_rate():
    won = [1.0] * 30 + [0.0] * 10
    found = length_controlled_win_rate(won, [7.0] * 40, [7.0] * 40, Resampling(resamples=100))
    assert found.mean == pytest.approx(0.75, abs=1e-3)
    assert 0.99 < length_controlled_win_rate([1.0] * 40, [7.0] * 40, [5.0] * 40, Resampling(resamples=10)).mean < 1
