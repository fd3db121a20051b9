import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_rows import LENGTHS, PackedRow, assert_same_loss, assert_same_metrics, policies, random_values
from trl_trainers import float64_default, loss_inputs, rloo_trainer, scored

from megatron_async_rlhf.algorithms.kl import kl_penalty
from megatron_async_rlhf.algorithms.rloo import leave_one_out_advantages, proximal_rloo_loss, rloo_loss

trl = pytest.mark.filterwarnings("ignore")
ROW = PackedRow(LENGTHS)
REAL_S = torch.ones(len(LENGTHS), dtype=torch.bool)
ADVANTAGES_S = random_values(LENGTHS, 9, -2, 2)[:, 0]


def log_ratio(policy_SL: torch.Tensor, base_SL: torch.Tensor) -> torch.Tensor:
    return ROW.segments.sum(ROW.lay(policy_SL) - ROW.lay(base_SL))


@trl
@pytest.mark.parametrize(("clip_low", "clip_high"), [(0.2, 0.2), (0.1, 0.3)])
def test_proximal_loss_and_gradient_equal_trl(clip_low: float, clip_high: float):
    policy_SL, proximal_SL, *_ = policies(LENGTHS)
    trainer = rloo_trainer({"policy": policy_SL}, clip_low=clip_low, clip_high=clip_high)
    old_S = (proximal_SL * ROW.mask_SL).sum(1)
    theirs = trainer._compute_loss(trainer.model, loss_inputs(ROW.mask_SL, ADVANTAGES_S, old_logps=old_S))
    ours, metrics = proximal_rloo_loss(
        log_ratio(policy_SL, proximal_SL), ADVANTAGES_S, REAL_S,
        clip_low=clip_low, clip_high=clip_high, num_sequences=len(LENGTHS),
    )  # fmt: skip
    assert_same_loss(ours, theirs, policy_SL)
    for side in ("low", "high"):
        (their_share,) = trainer._metrics["train"][f"clip_ratio/{side}_mean"]
        assert metrics[f"ratio/clipped_{side}"].item() == pytest.approx(their_share)


@trl
@pytest.mark.parametrize("beta", [0.0, 0.05])
@pytest.mark.parametrize("samples", [2, 4])
def test_advantages_with_kl_in_the_reward_equal_trl(beta: float, samples: int):
    lengths = [5, 1, 2, 3, 7, 1, 4, 2]  # TRL makes no line without tokens
    row = PackedRow(lengths)
    _, proximal_SL, _, reference_SL = policies(lengths)
    rewards_S = random_values(lengths, 6, -1, 1)[:, 0]
    with float64_default():
        trainer = rloo_trainer(
            {"policy": proximal_SL, "reference": reference_SL, "mask": row.mask_SL, "rewards": rewards_S}, beta=beta
        )
        theirs_S = scored(trainer, samples)["advantages"]
    penalty_T = kl_penalty(row.lay(proximal_SL), row.lay(reference_SL), row.segments.mask_T, coefficient=beta)
    ours_GK = leave_one_out_advantages((rewards_S + row.segments.sum(penalty_T)).reshape(-1, samples))
    torch.testing.assert_close(ours_GK.flatten(), theirs_S, rtol=1e-9, atol=1e-12)


def test_losses_and_gradients_by_loops():
    policy_SL, proximal_SL, sampler_SL, _ = policies(LENGTHS)
    weight_S = log_ratio(proximal_SL, sampler_SL).exp()
    plain, _ = rloo_loss(
        ROW.segments.sum(ROW.lay(policy_SL)), ADVANTAGES_S, REAL_S, weight_S, num_sequences=len(LENGTHS)
    )
    clipped, metrics = proximal_rloo_loss(
        log_ratio(policy_SL, proximal_SL), ADVANTAGES_S, REAL_S, weight_S,
        clip_low=0.2, clip_high=0.2, num_sequences=len(LENGTHS),
    )  # fmt: skip
    plain_total, clipped_total = 0.0, 0.0
    plain_SL, clipped_SL = torch.zeros_like(policy_SL), torch.zeros_like(policy_SL)
    for s, length in enumerate(LENGTHS):
        tokens = range(length)
        advantage = ADVANTAGES_S[s].item()
        weight = math.exp(sum((proximal_SL[s, t] - sampler_SL[s, t]).item() for t in tokens))
        ratio = math.exp(sum((policy_SL[s, t] - proximal_SL[s, t]).item() for t in tokens))
        plain_total -= weight * advantage * sum(policy_SL[s, t].item() for t in tokens) / len(LENGTHS)
        bound = 1.2 if advantage > 0 else 0.8
        outside = ratio > bound if advantage > 0 else ratio < bound
        clipped_total -= weight * advantage * (bound if outside else ratio) / len(LENGTHS)
        plain_SL[s, :length] = -weight * advantage / len(LENGTHS)
        clipped_SL[s, :length] = 0 if outside else -weight * advantage * ratio / len(LENGTHS)
    for ours, total, gradient_SL in [(plain, plain_total, plain_SL), (clipped, clipped_total, clipped_SL)]:
        assert ours.item() == pytest.approx(total, rel=1e-9)
        torch.testing.assert_close(torch.autograd.grad(ours, policy_SL)[0], gradient_SL, rtol=1e-9, atol=1e-12)
    assert_same_metrics([metrics], metrics)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31))
def test_an_unchanged_policy_has_the_gradient_of_the_plain_loss(seed: int):
    policy_SL = random_values(LENGTHS, seed).requires_grad_()
    count = {"num_sequences": len(LENGTHS)}
    plain, _ = rloo_loss(ROW.segments.sum(ROW.lay(policy_SL)), ADVANTAGES_S, REAL_S, **count)
    unchanged_S = log_ratio(policy_SL, policy_SL.detach())
    clipped, metrics = proximal_rloo_loss(unchanged_S, ADVANTAGES_S, REAL_S, clip_low=0.2, clip_high=0.2, **count)
    gradients = [torch.autograd.grad(loss, policy_SL)[0] for loss in (plain, clipped)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)
    assert metrics["ratio/mean"].item() == pytest.approx(1)


@pytest.mark.parametrize("rubbish", [0.0, 1e3, float("nan"), float("inf")])
def test_sequences_that_only_keep_ranks_in_step_change_nothing(rubbish: float):
    policy_SL, proximal_SL, *_ = policies(LENGTHS)
    real = [log_ratio(policy_SL, proximal_SL), ADVANTAGES_S]
    padded = [torch.cat([t, t.new_full((2,), rubbish)]) for t in real]
    mask_S = torch.cat([REAL_S, ~REAL_S[:2]])
    weight_S = torch.full((len(mask_S),), 0.5, dtype=torch.float64).where(mask_S, rubbish)
    count = {"num_sequences": len(LENGTHS)}
    clip = {"clip_low": 0.2, "clip_high": 0.2}
    for loss, keys in [(rloo_loss, count), (proximal_rloo_loss, count | clip)]:
        ours, metrics = loss(*padded, mask_S, weight_S, **keys)
        expected, expected_metrics = loss(*real, REAL_S, weight_S[: len(LENGTHS)], **keys)
        assert_same_loss(ours, expected, policy_SL)
        assert_same_metrics([metrics], expected_metrics)


def test_micro_batches_with_the_step_s_count_add_up():
    policy_SL, proximal_SL, *_ = policies(LENGTHS)
    values_S = log_ratio(policy_SL, proximal_SL)
    count = {"num_sequences": len(LENGTHS)}
    clip = {"clip_low": 0.2, "clip_high": 0.2}
    for loss, keys in [(rloo_loss, count), (proximal_rloo_loss, count | clip)]:
        whole, metrics = loss(values_S, ADVANTAGES_S, REAL_S, **keys)
        parts = [loss(values_S[s], ADVANTAGES_S[s], REAL_S[s], **keys) for s in ([0, 5, 2], [1, 3, 4, 6, 7])]
        assert_same_loss(sum(total for total, _ in parts), whole, policy_SL)
        assert_same_metrics([part for _, part in parts], metrics)


def test_no_advantage_is_no_loss_however_far_the_policies_are():
    log_ratio_S = torch.tensor([-1e3, 1e3]).requires_grad_()
    ours, _ = proximal_rloo_loss(
        log_ratio_S, torch.zeros(2), torch.ones(2).bool(), clip_low=0.2, clip_high=0.2, num_sequences=2
    )
    assert ours == 0
    assert torch.autograd.grad(ours, log_ratio_S)[0].tolist() == [0, 0]


def test_gradient_is_the_derivative():
    policy_SL, proximal_SL, *_ = policies(LENGTHS, spread=0.01)  # within the clip
    keys = {"clip_low": 0.2, "clip_high": 0.2, "num_sequences": len(LENGTHS)}
    assert torch.autograd.gradcheck(
        lambda x_S: proximal_rloo_loss(x_S, ADVANTAGES_S, REAL_S, **keys)[0], (log_ratio(policy_SL, proximal_SL),)
    )


def test_advantages_by_hand():
    # 1 - (2 + 6) / 2, 2 - (1 + 6) / 2, 6 - (1 + 2) / 2
    advantages_GK = leave_one_out_advantages(torch.tensor([[1.0, 2.0, 6.0], [5.0, 5.0, 5.0]]))
    assert advantages_GK.tolist() == [[-3.0, -1.5, 4.5], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("reward", [0.0, 0.1, 1 / 3, -1e6])
@pytest.mark.parametrize("samples", [2, 3, 7])
def test_a_tie_has_no_advantage(reward: float, samples: int):
    assert (leave_one_out_advantages(torch.full((2, samples), reward)) == 0).all()


def test_one_sample_leaves_none_out():
    with pytest.raises(ValueError, match="at least 2 samples per prompt, got 1"):
        leave_one_out_advantages(torch.ones(3, 1))
