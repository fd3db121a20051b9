import math

import pytest
import torch
from packed_rows import LENGTHS, PackedRow, policies

from megatron_async_rlhf.algorithms.kl import kl_estimate, kl_loss, kl_penalty
from megatron_async_rlhf.algorithms.normalisation import token_weights

ROW = PackedRow(LENGTHS)
COUNT = sum(LENGTHS)
SHARE_T = token_weights(ROW.segments, "token", num_tokens=COUNT, num_sequences=len(LENGTHS), dtype=torch.float64)
# of d = log pi - log pi_ref: the estimate, and what differentiating it gives per unit of log pi
BY_HAND = {
    "k1": (lambda d: d, lambda d: 1.0),
    "k2": (lambda d: d * d / 2, lambda d: d),
    "k3": (lambda d: math.exp(-d) - 1 + d, lambda d: 1 - math.exp(-d)),
}


@pytest.mark.parametrize("estimator", BY_HAND)
@pytest.mark.parametrize("gradient", ["policy", "estimator"])
@pytest.mark.parametrize("weighted", [True, False])
def test_loss_and_gradient_by_loops(estimator: str, gradient: str, weighted: bool):
    policy_SL, proximal_SL, sampler_SL, reference_SL = policies(LENGTHS)
    weight_SL = (proximal_SL - sampler_SL).exp() if weighted else torch.ones_like(proximal_SL)
    ours, metrics = kl_loss(
        ROW.lay(policy_SL), ROW.lay(reference_SL), SHARE_T, ROW.segments.mask_T,
        ROW.lay(weight_SL) if weighted else None,
        estimator=estimator, gradient=gradient, num_tokens=COUNT,
    )  # fmt: skip
    value, slope = BY_HAND[estimator]
    total, mean, gradient_SL = 0.0, 0.0, torch.zeros_like(policy_SL)
    for s, length in enumerate(LENGTHS):
        for t in range(length):
            d = (policy_SL[s, t] - reference_SL[s, t]).item()
            total += weight_SL[s, t].item() * value(d) / COUNT
            mean += value(d) / COUNT
            gradient_SL[s, t] = weight_SL[s, t] * (d if gradient == "policy" else slope(d)) / COUNT
    assert ours.item() == pytest.approx(total, rel=1e-9)
    torch.testing.assert_close(torch.autograd.grad(ours, policy_SL)[0], gradient_SL, rtol=1e-9, atol=1e-12)
    assert metrics["kl/per_token"].item() == pytest.approx(mean, rel=1e-9)
    assert not any(value.requires_grad for value in metrics.values())


@pytest.fixture
def two_policies() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a policy, with gradient, and log-probabilities of a reference over 11 tokens."""
    generator = torch.Generator().manual_seed(0)
    logits_V, reference_V = (torch.randn(11, generator=generator, dtype=torch.float64) for _ in range(2))
    return logits_V.requires_grad_(), reference_V.log_softmax(0)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_estimates_are_unbiased(two_policies, estimator: str):
    logits_V, reference_V = two_policies
    logprobs_V = logits_V.log_softmax(0)
    kl = torch.distributions.kl_divergence(
        *(torch.distributions.Categorical(logits=x_V) for x_V in (logprobs_V, reference_V))
    )
    expected = (logprobs_V.exp() * kl_estimate(logprobs_V - reference_V, estimator)).sum()
    torch.testing.assert_close(expected, kl, rtol=1e-12, atol=0)


def expected_gradient(logits_V: torch.Tensor, reference_V: torch.Tensor, sampler_V: torch.Tensor, **keys):
    """Of the loss, exactly: every token of the vocabulary as often as the sampler draws it."""
    logprobs_V = logits_V.log_softmax(0)
    weight_V = (logprobs_V - sampler_V).exp()
    loss, _ = kl_loss(
        logprobs_V, reference_V, sampler_V.exp(), torch.ones(11).bool(), weight_V, **keys, num_tokens=1
    )  # fmt: skip
    return torch.autograd.grad(loss, logits_V)[0]


@pytest.mark.parametrize("estimator", BY_HAND)
@pytest.mark.parametrize("on_policy", [True, False])
def test_the_policy_s_gradient_is_that_of_the_kl_in_expectation(two_policies, estimator: str, on_policy: bool):
    logits_V, reference_V = two_policies
    other_V = torch.randn(11, generator=torch.Generator().manual_seed(5), dtype=torch.float64).log_softmax(0)
    sampler_V = logits_V.detach().log_softmax(0) if on_policy else other_V
    logprobs_V = logits_V.log_softmax(0)
    (right_V,) = torch.autograd.grad((logprobs_V.exp() * (logprobs_V - reference_V)).sum(), logits_V)
    ours_V = expected_gradient(logits_V, reference_V, sampler_V, estimator=estimator, gradient="policy")
    torch.testing.assert_close(ours_V, right_V, rtol=1e-9, atol=1e-12)


def test_the_estimators_own_gradients_are_what_the_docstring_says(two_policies):
    logits_V, reference_V = two_policies
    sampler_V = logits_V.detach().log_softmax(0)
    own = {
        name: expected_gradient(logits_V, reference_V, sampler_V, estimator=name, gradient="estimator")
        for name in BY_HAND
    }
    logprobs_V = logits_V.log_softmax(0)
    (right_V,) = torch.autograd.grad((logprobs_V.exp() * (logprobs_V - reference_V)).sum(), logits_V, retain_graph=True)
    (reverse_V,) = torch.autograd.grad((reference_V.exp() * (reference_V - logprobs_V)).sum(), logits_V)
    torch.testing.assert_close(own["k1"], torch.zeros_like(right_V), rtol=0, atol=1e-12)
    torch.testing.assert_close(own["k2"], right_V, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(own["k3"], reverse_V, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("estimator", BY_HAND)
def test_gradient_is_the_derivative(estimator: str):
    policy_SL, _, _, reference_SL = policies([3, 2])
    assert torch.autograd.gradcheck(lambda x_SL: kl_estimate(x_SL - reference_SL, estimator), (policy_SL,))


@pytest.mark.parametrize("estimator", BY_HAND)
def test_penalty_per_token_and_per_sequence_by_loops(estimator: str):
    _, proximal_SL, _, reference_SL = policies(LENGTHS)
    penalty_T = kl_penalty(
        ROW.lay(proximal_SL), ROW.lay(reference_SL), ROW.segments.mask_T, coefficient=0.05, estimator=estimator
    )
    sums_S = ROW.segments.sum(penalty_T)
    assert (penalty_T[~ROW.segments.mask_T] == 0).all()
    for s, length in enumerate(LENGTHS):
        values = [-0.05 * BY_HAND[estimator][0]((proximal_SL[s, t] - reference_SL[s, t]).item()) for t in range(length)]
        assert ROW.tokens(penalty_T)[s] == pytest.approx(values, rel=1e-9)
        assert sums_S[s].item() == pytest.approx(sum(values), rel=1e-9, abs=1e-15)


def test_the_loss_with_length_one_sums_over_each_sequence():
    """As the RLOO code of the paper's second branch does: mean over sequences of the summed k3."""
    policy_SL, _, _, reference_SL = policies(LENGTHS)
    token_weights_T = token_weights(
        ROW.segments, "constant", num_tokens=COUNT, num_sequences=len(LENGTHS), length=1, dtype=torch.float64
    )
    ours, _ = kl_loss(
        ROW.lay(policy_SL), ROW.lay(reference_SL), token_weights_T, ROW.segments.mask_T,
        estimator="k3", gradient="estimator", num_tokens=COUNT,
    )  # fmt: skip
    d_SL = (reference_SL - policy_SL) * ROW.mask_SL
    theirs = (d_SL.exp() - d_SL - 1).sum(1).mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(loss, policy_SL)[0] for loss in (ours, theirs)))
