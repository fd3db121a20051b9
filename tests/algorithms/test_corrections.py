import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_rows import LENGTHS, PackedRow, assert_same_loss, policies, random_values

from megatron_async_rlhf.algorithms.corrections import (
    correction_weights,
    effective_sample_share,
    sampler_divergence,
)
from megatron_async_rlhf.algorithms.normalisation import token_weights
from megatron_async_rlhf.algorithms.ppo import clipped_policy_loss

ROW = PackedRow(LENGTHS)
COUNT = sum(LENGTHS)


def expected_weight(kind: str, rho: float, low: float, high: float) -> float:
    if kind == "truncate":
        return min(max(rho, low), high)
    return rho if low <= rho <= high else 0.0


@pytest.mark.parametrize("kind", ["truncate", "mask"])
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.2), (0.8, 1.2)])
def test_weights_and_metrics_of_tokens_by_loops(kind: str, low: float, high: float):
    _, proximal_SL, sampler_SL, _ = policies(LENGTHS)
    weight_T, metrics = correction_weights(
        ROW.lay(proximal_SL) - ROW.lay(sampler_SL), ROW.segments.mask_T, kind=kind, low=low, high=high, count=COUNT
    )
    rhos = [
        [math.exp((proximal_SL[s, t] - sampler_SL[s, t]).item()) for t in range(length)]
        for s, length in enumerate(LENGTHS)
    ]
    weights = [[expected_weight(kind, rho, low, high) for rho in own] for own in rhos]
    for ours, expected in zip(ROW.tokens(weight_T), weights, strict=True):
        assert ours == pytest.approx(expected, rel=1e-9)
    assert (weight_T[~ROW.segments.mask_T] == 0).all()
    flat, flat_weights = sum(rhos, []), sum(weights, [])
    assert metrics["sampler/ratio"].item() == pytest.approx(sum(flat) / COUNT, rel=1e-9)
    outside = sum(not low <= rho <= high for rho in flat) / COUNT
    assert 0 < outside < 1
    assert metrics["sampler/ratio_outside"].item() == pytest.approx(outside)
    effective = sum(flat_weights) ** 2 / sum(w * w for w in flat_weights) / COUNT
    share = effective_sample_share({name: value.item() for name, value in metrics.items()})
    assert share == pytest.approx(effective, rel=1e-9)


@pytest.mark.parametrize("kind", ["truncate", "mask"])
def test_weights_of_sequences_by_loops(kind: str):
    _, proximal_SL, sampler_SL, _ = policies(LENGTHS)
    log_rho_S = ROW.segments.sum(ROW.lay(proximal_SL) - ROW.lay(sampler_SL))
    real_S = torch.ones(len(LENGTHS), dtype=torch.bool)
    weight_S, _ = correction_weights(log_rho_S, real_S, kind=kind, low=0.7, high=1.3, count=len(LENGTHS))
    for s, length in enumerate(LENGTHS):
        rho = math.exp(sum((proximal_SL[s, t] - sampler_SL[s, t]).item() for t in range(length)))
        assert weight_S[s].item() == pytest.approx(expected_weight(kind, rho, 0.7, 1.3), rel=1e-9)
    assert 0 < (weight_S == (0 if kind == "mask" else 1.3)).sum() < len(LENGTHS)


def test_a_sequence_that_only_keeps_ranks_in_step_weighs_nothing():
    log_rho_S, real_S = torch.tensor([0.0, float("nan")]), torch.tensor([True, False])
    weight_S, metrics = correction_weights(log_rho_S, real_S, kind="truncate", count=1)
    assert weight_S.tolist() == [1, 0]
    assert metrics["sampler/ratio"] == metrics["correction/weight"] == 1


def weighted_loss(policy_SL: torch.Tensor, base_SL: torch.Tensor, weight_T: torch.Tensor | None, clip: float):
    token_weights_T = token_weights(
        ROW.segments, "token", num_tokens=COUNT, num_sequences=len(LENGTHS), dtype=torch.float64
    )
    advantages_T = ROW.segments.spread(random_values(LENGTHS, 9, -2, 2)[:, 0])
    return clipped_policy_loss(
        ROW.lay(policy_SL), ROW.lay(base_SL), advantages_T, token_weights_T, ROW.segments, weight_T,
        clip_low=clip, clip_high=clip, num_tokens=COUNT,
    )[0]  # fmt: skip


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([1e6, math.inf]))
def test_a_high_truncation_is_plain_importance_sampling(seed: int, high: float):
    """Decoupled PPO without clips is the ratio of policy and sampler times the advantage: the base cancels out."""
    policy_SL, proximal_SL, sampler_SL, _ = policies(LENGTHS, seed)
    weight_T, _ = correction_weights(
        ROW.lay(proximal_SL) - ROW.lay(sampler_SL), ROW.segments.mask_T, kind="truncate", high=high, count=COUNT
    )
    decoupled = weighted_loss(policy_SL, proximal_SL, weight_T, clip=1e9)
    plain = weighted_loss(policy_SL, sampler_SL, None, clip=1e9)
    assert_same_loss(decoupled, plain, policy_SL)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(["truncate", "mask"]))
def test_the_sampler_s_own_tokens_need_no_correction(seed: int, kind: str):
    policy_SL = random_values(LENGTHS, seed).requires_grad_()
    same_T = ROW.lay(policy_SL.detach())
    weight_T, metrics = correction_weights(
        same_T - same_T, ROW.segments.mask_T, kind=kind, low=0.5, high=2.0, count=COUNT
    )
    corrected = weighted_loss(policy_SL, policy_SL.detach(), weight_T, clip=0.2)
    assert_same_loss(corrected, weighted_loss(policy_SL, policy_SL.detach(), None, clip=0.2), policy_SL)
    assert effective_sample_share({name: value.item() for name, value in metrics.items()}) == pytest.approx(1)
    divergence = sampler_divergence(same_T, same_T, ROW.segments.mask_T, num_tokens=COUNT)
    assert divergence["sampler/kl_k1"] == divergence["sampler/kl_k3"] == 0


def test_the_weight_is_no_part_of_the_gradient():
    policy_SL, proximal_SL, sampler_SL, _ = policies(LENGTHS)
    log_rho_T = ROW.lay(policy_SL) - ROW.lay(sampler_SL)
    weight_T, metrics = correction_weights(log_rho_T, ROW.segments.mask_T, kind="truncate", high=2.0, count=COUNT)
    assert not weight_T.requires_grad
    assert not any(value.requires_grad for value in metrics.values())


def test_divergence_and_metrics_of_micro_batches_add_up():
    policy_SL, proximal_SL, sampler_SL, _ = policies(LENGTHS)

    def of(rows: list[int]) -> dict[str, torch.Tensor]:
        row = PackedRow([LENGTHS[s] for s in rows])
        policy_T, proximal_T, sampler_T = (
            row.lay(x_SL[rows, : max(row.lengths)]) for x_SL in (policy_SL, proximal_SL, sampler_SL)
        )
        _, metrics = correction_weights(
            proximal_T - sampler_T, row.segments.mask_T, kind="mask", low=0.8, high=1.2, count=COUNT
        )
        return metrics | sampler_divergence(policy_T, sampler_T, row.segments.mask_T, num_tokens=COUNT)

    whole, parts = of(list(range(len(LENGTHS)))), [of([2, 0, 7]), of([1, 3, 4, 5, 6])]
    for name, value in whole.items():
        torch.testing.assert_close(sum(part[name] for part in parts), value, rtol=1e-9, atol=1e-12)
    d = [(sampler_SL[s, t] - policy_SL[s, t]).item() for s, n in enumerate(LENGTHS) for t in range(n)]
    assert whole["sampler/kl_k1"].item() == pytest.approx(sum(d) / COUNT, rel=1e-9)
    assert whole["sampler/kl_k3"].item() == pytest.approx(sum(math.exp(-x) - 1 + x for x in d) / COUNT, rel=1e-9)


def test_far_off_sequences_stay_finite_in_float32():
    log_rho_S, real_S = torch.tensor([-1e4, 1e4]), torch.ones(2).bool()
    for kind in ("truncate", "mask"):
        weight_S, metrics = correction_weights(log_rho_S, real_S, kind=kind, count=2)
        assert torch.isfinite(weight_S).all()
        assert all(torch.isfinite(value) for value in metrics.values())


def test_without_weights_there_is_no_effective_sample():
    assert effective_sample_share({"correction/weight": 0.0, "correction/weight_squared": 0.0}) == 0.0
