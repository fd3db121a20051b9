import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_rows import GARBAGE, LENGTHS, PackedRow, assert_same_loss, assert_same_metrics, policies, random_values

from megatron_async_rlhf.algorithms.normalisation import token_weights
from megatron_async_rlhf.algorithms.ppo import clipped_policy_loss, clipped_value_loss

ROW = PackedRow(LENGTHS)
COUNT = sum(LENGTHS)
POLICY = {"clip_low": 0.2, "clip_high": 0.2, "num_tokens": COUNT}


def token_mean(row: PackedRow) -> torch.Tensor:
    return token_weights(row.segments, "token", num_tokens=COUNT, num_sequences=len(LENGTHS), dtype=torch.float64)


def policy_loss(row: PackedRow, policy_SL, proximal_SL, advantages_SL, weight_SL=None, **keys):
    fill = keys.pop("fill", GARBAGE)
    weight_T = None if weight_SL is None else row.lay(weight_SL, fill)
    tensors = [row.lay(values_SL, fill) for values_SL in (policy_SL, proximal_SL, advantages_SL)]
    return clipped_policy_loss(*tensors, token_mean(row), row.segments, weight_T, **(POLICY | keys))


def test_policy_loss_and_gradient_by_loops():
    policy_SL, proximal_SL, sampler_SL, _ = policies(LENGTHS)
    advantages_SL, weight_SL = random_values(LENGTHS, 4, -2, 2), (proximal_SL - sampler_SL).exp()
    ours, metrics = policy_loss(ROW, policy_SL, proximal_SL, advantages_SL, weight_SL)
    total, clipped, gradient_SL = 0.0, 0, torch.zeros_like(policy_SL)
    for s, length in enumerate(LENGTHS):
        for t in range(length):
            advantage, weight = advantages_SL[s, t].item(), weight_SL[s, t].item()
            ratio = math.exp(policy_SL[s, t].item() - proximal_SL[s, t].item())
            bound = 1.2 if advantage > 0 else 0.8
            outside = ratio > bound if advantage > 0 else ratio < bound
            total -= weight * advantage * (bound if outside else ratio) / COUNT
            gradient_SL[s, t] = 0 if outside else -weight * advantage * ratio / COUNT
            clipped += outside
    assert 0 < clipped < COUNT
    assert ours.item() == pytest.approx(total, rel=1e-9)
    torch.testing.assert_close(torch.autograd.grad(ours, policy_SL)[0], gradient_SL, rtol=1e-9, atol=1e-12)
    both = metrics["ratio/clipped_low"] + metrics["ratio/clipped_high"]
    assert both.item() == pytest.approx(clipped / COUNT)
    assert_same_metrics([metrics], metrics)


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(len(LENGTHS))))
def test_the_order_of_sequences_changes_nothing(order: list[int]):
    policy_SL, proximal_SL, *_ = policies(LENGTHS)
    advantages_SL = random_values(LENGTHS, 4, -2, 2)
    losses = [
        policy_loss(PackedRow(LENGTHS, order=o), policy_SL, proximal_SL, advantages_SL)[0]
        for o in (order, sorted(order))
    ]
    assert_same_loss(*losses, policy_SL)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(["token", "sequence_token"]))
def test_an_unchanged_policy_has_ratio_one_and_the_plain_policy_gradient(seed: int, level: str):
    policy_SL = random_values(LENGTHS, seed).requires_grad_()
    advantages_SL = random_values(LENGTHS, seed + 1, -2, 2)
    ours, metrics = policy_loss(ROW, policy_SL, policy_SL.detach(), advantages_SL, level=level)
    plain = -(policy_SL * advantages_SL)[ROW.mask_SL].sum() / COUNT
    (our_gradient,), (plain_gradient,) = (torch.autograd.grad(loss, policy_SL) for loss in (ours, plain))
    torch.testing.assert_close(our_gradient, plain_gradient, rtol=1e-12, atol=1e-15)
    assert metrics["ratio/mean"].item() == pytest.approx(1)
    assert metrics["ratio/clipped_low"] == metrics["ratio/clipped_high"] == 0


def test_no_advantage_is_no_loss_however_far_the_policies_are():
    policy_SL, proximal_SL, *_ = policies(LENGTHS, spread=2000.0)
    ours, _ = policy_loss(ROW, policy_SL, proximal_SL, torch.zeros_like(policy_SL))
    assert ours == 0
    assert (torch.autograd.grad(ours, policy_SL)[0] == 0).all()


def test_a_far_off_policy_stays_finite_in_float32():
    values_T = torch.tensor([-1000.0, 0.0]).requires_grad_()
    row = PackedRow([2])
    tokens = row.segments.mask_T
    policy_T = torch.zeros(len(tokens)).index_put((tokens,), values_T)
    base_T = torch.zeros(len(tokens)).index_put((tokens,), torch.tensor([0.0, -1000.0]))
    for advantage in (1.0, -1.0):
        total, _ = clipped_policy_loss(
            policy_T, base_T, torch.full_like(policy_T, advantage), tokens / 2.0, row.segments, **POLICY
        )
        assert torch.isfinite(total)
        assert torch.isfinite(torch.autograd.grad(total, values_T, retain_graph=True)[0]).all()


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_gradient_is_the_derivative(level: str):
    policy_SL, proximal_SL, *_ = policies(LENGTHS, spread=0.1)  # far enough from the corners of the clip
    advantages_SL = random_values(LENGTHS, 4, -2, 2)
    assert torch.autograd.gradcheck(
        lambda x_SL: policy_loss(ROW, x_SL, proximal_SL, advantages_SL, level=level, fill=GARBAGE[3:])[0], (policy_SL,)
    )


def value_inputs() -> list[torch.Tensor]:
    values_SL = random_values(LENGTHS, 0, -1, 1).requires_grad_()
    old_SL = values_SL.detach() + random_values(LENGTHS, 1, -0.5, 0.5)
    return [values_SL, old_SL, random_values(LENGTHS, 2, -2, 2)]


@pytest.mark.parametrize("clip", [0.2, None])
def test_value_loss_and_gradient_by_loops(clip: float | None):
    values_SL, old_SL, returns_SL = value_inputs()
    ours, metrics = clipped_value_loss(
        *(ROW.lay(tensor) for tensor in (values_SL, old_SL, returns_SL)), ROW.segments.mask_T,
        clip=clip, num_tokens=COUNT,
    )  # fmt: skip
    total, clipped, gradient_SL = 0.0, 0, torch.zeros_like(values_SL)
    for s, length in enumerate(LENGTHS):
        for t in range(length):
            value, old, target = (tensor[s, t].item() for tensor in (values_SL, old_SL, returns_SL))
            near = value if clip is None else min(max(value, old - clip), old + clip)
            is_clipped = (near - target) ** 2 > (value - target) ** 2
            total += 0.5 * max((value - target) ** 2, (near - target) ** 2) / COUNT
            gradient_SL[s, t] = 0 if is_clipped else (value - target) / COUNT
            clipped += is_clipped
    assert (clipped > 0) == (clip is not None)
    assert ours.item() == pytest.approx(total, rel=1e-9)
    torch.testing.assert_close(torch.autograd.grad(ours, values_SL)[0], gradient_SL, rtol=1e-9, atol=1e-12)
    assert metrics["value/clipped"].item() == pytest.approx(clipped / COUNT)
    assert not any(value.requires_grad for value in metrics.values())


def test_value_losses_of_micro_batches_add_up():
    tensors = value_inputs()

    def of(rows: list[int]):
        row = PackedRow([LENGTHS[s] for s in rows])
        laid = (row.lay(tensor[rows, : max(row.lengths)]) for tensor in tensors)
        return clipped_value_loss(*laid, row.segments.mask_T, clip=0.2, num_tokens=COUNT)

    whole, metrics = of(list(range(len(LENGTHS))))
    parts = [of([1, 4, 2]), of([0, 3, 5, 6, 7])]
    assert_same_loss(sum(total for total, _ in parts), whole, tensors[0])
    assert_same_metrics([part for _, part in parts], metrics, rtol=1e-9, atol=1e-12)
