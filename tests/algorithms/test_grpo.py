import math
from functools import partial

import pytest
import torch
from packed_rows import LENGTHS, PackedRow, assert_same_loss, assert_same_metrics, policies, random_values
from trl_trainers import float64_default, grpo_trainer, loss_inputs, scored

from megatron_async_rlhf.algorithms.corrections import correction_weights
from megatron_async_rlhf.algorithms.grpo import cispo_loss, group_advantages
from megatron_async_rlhf.algorithms.kl import kl_loss
from megatron_async_rlhf.algorithms.normalisation import token_weights
from megatron_async_rlhf.algorithms.ppo import clipped_policy_loss
from megatron_async_rlhf.algorithms.ratios import bounded_exp, policy_log_ratio

pytestmark = pytest.mark.filterwarnings("ignore")
ROW = PackedRow(LENGTHS)
MAX_LENGTH = 16
ADVANTAGES_S = random_values(LENGTHS, 9, -2, 2)[:, 0]
OF_TRL = {"grpo": "sequence", "bnpo": "token", "dapo": "token", "cispo": "token", "dr_grpo": "constant"}


def shares(row: PackedRow, normalisation: str, num_tokens: int = sum(LENGTHS), num_sequences: int = len(LENGTHS)):
    return token_weights(
        row.segments, normalisation, num_tokens=num_tokens, num_sequences=num_sequences, length=MAX_LENGTH,
        dtype=torch.float64,
    )  # fmt: skip


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize(("clip_low", "clip_high", "cap"), [(0.2, 0.2, None), (0.2, 0.28, None), (0.1, 0.2, 1.4)])
def test_losses_and_gradients_equal_trl(loss_type: str, clip_low: float, clip_high: float, cap: float | None):
    policy_SL, proximal_SL, *_ = policies(LENGTHS)
    trainer = grpo_trainer(
        {"policy": policy_SL}, loss_type=loss_type, clip_low=clip_low, clip_high=clip_high, delta=cap,
        max_length=MAX_LENGTH,
    )  # fmt: skip
    theirs = trainer._compute_loss(
        trainer.model, loss_inputs(ROW.mask_SL, ADVANTAGES_S, old_per_token_logps=proximal_SL)
    )
    ours, metrics = clipped_policy_loss(
        ROW.lay(policy_SL), ROW.lay(proximal_SL), ROW.segments.spread(ADVANTAGES_S),
        shares(ROW, OF_TRL[loss_type]), ROW.segments,
        clip_low=clip_low, clip_high=clip_high, ratio_cap=cap, num_tokens=ROW.num_tokens,
    )  # fmt: skip
    assert_same_loss(ours, theirs, policy_SL)
    if cap is None:  # TRL counts what is clipped after the cap
        for side in ("low", "high"):
            (their_share,) = trainer._metrics["train"][f"clip_ratio/{side}_mean"]
            assert their_share > 0
            assert metrics[f"ratio/clipped_{side}"].item() == pytest.approx(their_share, rel=1e-6)


def test_gspo_equals_trl():
    policy_SL, proximal_SL, *_ = policies(LENGTHS)
    trainer = grpo_trainer({"policy": policy_SL}, level="sequence", clip_low=0.1, clip_high=0.15)
    theirs = trainer._compute_loss(
        trainer.model, loss_inputs(ROW.mask_SL, ADVANTAGES_S, old_per_token_logps=proximal_SL)
    )
    # TRL gives an empty completion, whose ratio is 1, no loss either
    ours, _ = clipped_policy_loss(
        ROW.lay(policy_SL), ROW.lay(proximal_SL), ROW.segments.spread(ADVANTAGES_S), shares(ROW, "sequence"),
        ROW.segments, level="sequence", clip_low=0.1, clip_high=0.15, num_tokens=ROW.num_tokens,
    )  # fmt: skip
    assert_same_loss(ours, theirs, policy_SL)


def test_gspo_token_by_loops():
    """One ratio per sequence, and a gradient `s_i A_t grad log pi_t` per token for advantages of its own."""
    policy_SL, proximal_SL, *_ = policies(LENGTHS)
    advantages_SL = random_values(LENGTHS, 4, -1, 1)
    ours, _ = clipped_policy_loss(
        ROW.lay(policy_SL), ROW.lay(proximal_SL), ROW.lay(advantages_SL), shares(ROW, "sequence"), ROW.segments,
        level="sequence_token", clip_low=9.0, clip_high=9.0, num_tokens=ROW.num_tokens,
    )  # fmt: skip
    total, gradient_SL = 0.0, torch.zeros_like(policy_SL)
    for s, length in enumerate(LENGTHS):
        differences = [(policy_SL[s, t] - proximal_SL[s, t]).item() for t in range(length)]
        ratio = math.exp(sum(differences) / length) if length else 1.0
        for t in range(length):
            term = -ratio * advantages_SL[s, t].item() / length / len(LENGTHS)
            total += term
            gradient_SL[s, t] = term
    assert ours.item() == pytest.approx(total, rel=1e-9)
    torch.testing.assert_close(torch.autograd.grad(ours, policy_SL)[0], gradient_SL, rtol=1e-9, atol=1e-12)


def test_gspo_token_equals_gspo_where_a_sequence_has_one_advantage():
    policy_SL, proximal_SL, *_ = policies(LENGTHS)
    losses = [
        clipped_policy_loss(
            ROW.lay(policy_SL), ROW.lay(proximal_SL), ROW.segments.spread(ADVANTAGES_S), shares(ROW, "sequence"),
            ROW.segments, level=level, clip_low=0.1, clip_high=0.15, num_tokens=ROW.num_tokens,
        )[0]
        for level in ("sequence", "sequence_token")
    ]  # fmt: skip
    assert_same_loss(*losses, policy_SL)


@pytest.mark.parametrize("bound", [1.2, 5.0])
def test_cispo_equals_trl(bound: float):
    policy_SL, proximal_SL, *_ = policies(LENGTHS)
    trainer = grpo_trainer({"policy": policy_SL}, loss_type="cispo", clip_high=bound)
    theirs = trainer._compute_loss(
        trainer.model, loss_inputs(ROW.mask_SL, ADVANTAGES_S, old_per_token_logps=proximal_SL)
    )
    ours, metrics = cispo_loss(
        ROW.lay(policy_SL), ROW.lay(proximal_SL), ROW.segments.spread(ADVANTAGES_S), shares(ROW, "token"),
        ROW.segments, ratio_high=bound, num_tokens=ROW.num_tokens,
    )  # fmt: skip
    assert_same_loss(ours, theirs, policy_SL)
    above = ((policy_SL - proximal_SL).exp() > bound)[ROW.mask_SL]
    assert metrics["ratio/clipped_high"].item() == pytest.approx(above.double().mean().item())


def test_cispo_bounds_a_weighted_ratio_on_both_sides():
    policy_SL, proximal_SL, sampler_SL, _ = policies(LENGTHS)
    weight_SL = (proximal_SL - sampler_SL).exp()
    ours, _ = cispo_loss(
        ROW.lay(policy_SL), ROW.lay(proximal_SL), ROW.segments.spread(ADVANTAGES_S), shares(ROW, "token"),
        ROW.segments, ROW.lay(weight_SL), ratio_low=0.9, ratio_high=1.1, num_tokens=ROW.num_tokens,
    )  # fmt: skip
    gradient_SL = torch.zeros_like(policy_SL)
    for s, length in enumerate(LENGTHS):
        for t in range(length):
            ratio = min(max(math.exp((policy_SL[s, t] - proximal_SL[s, t]).item()), 0.9), 1.1)
            gradient_SL[s, t] = -ratio * weight_SL[s, t] * ADVANTAGES_S[s] / ROW.num_tokens
    assert ours.item() == pytest.approx((gradient_SL * policy_SL).sum().item(), rel=1e-9)
    torch.testing.assert_close(torch.autograd.grad(ours, policy_SL)[0], gradient_SL, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bias_correction", [False, True])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_with_kl_in_the_loss_equals_trl(loss_type: str, bias_correction: bool):
    """TRL's bias correction multiplies k3 with a ratio that has a gradient; ours takes the KL's gradient directly."""
    policy_SL, proximal_SL, _, reference_SL = policies(LENGTHS)
    trainer = grpo_trainer(
        {"policy": policy_SL}, loss_type=loss_type, beta=0.3, bias_correction=bias_correction, max_length=MAX_LENGTH
    )
    theirs = trainer._compute_loss(
        trainer.model,
        loss_inputs(ROW.mask_SL, ADVANTAGES_S, old_per_token_logps=proximal_SL, ref_per_token_logps=reference_SL),
    )
    token_weights_T = shares(ROW, OF_TRL[loss_type])
    policy_loss, _ = clipped_policy_loss(
        ROW.lay(policy_SL), ROW.lay(proximal_SL), ROW.segments.spread(ADVANTAGES_S), token_weights_T, ROW.segments,
        clip_low=0.2, clip_high=0.2, num_tokens=ROW.num_tokens,
    )  # fmt: skip
    ratio_T = bounded_exp(policy_log_ratio(ROW.lay(policy_SL), ROW.lay(proximal_SL), ROW.segments, "token"))
    kl, metrics = kl_loss(
        ROW.lay(policy_SL), ROW.lay(reference_SL), token_weights_T, ROW.segments.mask_T,
        ratio_T if bias_correction else None,
        estimator="k3", gradient="policy" if bias_correction else "estimator", num_tokens=ROW.num_tokens,
    )  # fmt: skip
    assert_same_loss(policy_loss + 0.3 * kl, theirs, policy_SL)
    if not bias_correction:
        (their_kl,) = trainer._metrics["train"]["kl"]
        assert metrics["kl/per_token"].item() == pytest.approx(their_kl, rel=1e-9)


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
@pytest.mark.parametrize(("low", "high"), [(None, 1.3), (0.8, 1.3)])
def test_with_a_correction_for_the_sampler_equals_trl(mode: str, low: float | None, high: float):
    lengths = [5, 1, 2, 3, 7, 1, 4, 2]  # TRL makes no line without tokens
    row = PackedRow(lengths)
    policy_SL, proximal_SL, sampler_SL, _ = policies(lengths)
    rewards_S = random_values(lengths, 5, 0, 1)[:, 0]
    level, kind = mode.split("_")
    with float64_default():
        trainer = grpo_trainer(
            {"policy": proximal_SL, "sampler": sampler_SL, "mask": row.mask_SL, "rewards": rewards_S},
            loss_type="dapo", sampler_correction=True,
        )  # fmt: skip
        trainer.vllm_importance_sampling_mode, trainer.scale_rewards = mode, "group"
        trainer.vllm_importance_sampling_clip_min, trainer.vllm_importance_sampling_clip_max = low, high
        inputs = scored(trainer, samples=4)
        trainer.logprobs["policy"] = policy_SL
        theirs = trainer._compute_loss(trainer.model, inputs)

    segments = row.segments
    bounds = {"kind": kind, "low": low or 0.0, "high": high}
    log_rho_T = row.lay(proximal_SL) - row.lay(sampler_SL)
    if level == "token":
        weight_T, metrics = correction_weights(log_rho_T, segments.mask_T, **bounds, count=row.num_tokens)
    else:
        real_S = torch.ones(len(lengths), dtype=torch.bool)
        weight_S, metrics = correction_weights(segments.sum(log_rho_T), real_S, **bounds, count=len(lengths))
        weight_T = segments.spread(weight_S)
    advantages_S = group_advantages(rewards_S.reshape(2, 4), scale=True).flatten()
    ours, _ = clipped_policy_loss(
        row.lay(policy_SL), row.lay(proximal_SL), segments.spread(advantages_S),
        shares(row, "token", row.num_tokens), segments, weight_T,
        clip_low=0.2, clip_high=0.2, num_tokens=row.num_tokens,
    )  # fmt: skip
    assert_same_loss(ours, theirs, policy_SL)
    (their_mean,) = trainer._metrics["train"]["sampling/importance_sampling_ratio/mean"]
    assert metrics["correction/weight"].item() == pytest.approx(their_mean, rel=1e-9)
    assert 0 < metrics["sampler/ratio_outside"].item() < 1


@pytest.mark.parametrize(("scale_rewards", "scale"), [("group", True), ("none", False)])
def test_advantages_equal_trl(scale_rewards: str, scale: bool):
    rewards_S = random_values([1] * 12, 6, -1, 1)[:, 0]
    rewards_S[4:8] = 0.1
    mask_SL = torch.ones(12, 1)
    with float64_default():
        trainer = grpo_trainer({"policy": -mask_SL, "mask": mask_SL, "rewards": rewards_S})
        trainer.scale_rewards = scale_rewards
        theirs = scored(trainer, samples=4)["advantages"]
    ours = group_advantages(rewards_S.reshape(3, 4), scale=scale)
    torch.testing.assert_close(ours.flatten(), theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("reward", [0.0, 0.1, 1 / 3, -1e6])
@pytest.mark.parametrize("samples", [1, 2, 3, 7])
def test_a_tie_has_no_advantage(scale: bool, reward: float, samples: int):
    assert (group_advantages(torch.full((2, samples), reward), scale=scale) == 0).all()


@pytest.mark.parametrize("normalisation", ["token", "sequence", "constant"])
@pytest.mark.parametrize("loss", ["clip", "gspo", "cispo", "kl"])
def test_micro_batches_with_the_step_s_counts_add_up(normalisation: str, loss: str):
    policy_SL, proximal_SL, sampler_SL, reference_SL = policies(LENGTHS)

    def of(rows: list[int]):
        row = PackedRow([LENGTHS[s] for s in rows])
        width = max(row.lengths)
        lay = lambda values_SL: row.lay(values_SL[rows, :width])  # noqa: E731
        token_weights_T = shares(row, normalisation)
        weight_T = lay((proximal_SL - sampler_SL).exp())
        if loss == "kl":
            mask_T = row.segments.mask_T
            return kl_loss(
                lay(policy_SL), lay(reference_SL), token_weights_T, mask_T, weight_T, num_tokens=sum(LENGTHS)
            )
        clip = partial(clipped_policy_loss, clip_low=0.2, clip_high=0.2)
        function = {
            "clip": clip,
            "gspo": partial(clip, level="sequence"),
            "cispo": partial(cispo_loss, ratio_high=1.2),
        }[loss]
        advantages_T = row.segments.spread(ADVANTAGES_S[rows])
        return function(
            lay(policy_SL),
            lay(proximal_SL),
            advantages_T,
            token_weights_T,
            row.segments,
            weight_T,
            num_tokens=sum(LENGTHS),
        )

    whole, metrics = of(list(range(len(LENGTHS))))
    parts = [of([0, 3, 2]), of([7, 1, 5, 4, 6])]
    assert_same_loss(sum(total for total, _ in parts), whole, policy_SL)
    assert_same_metrics([part for _, part in parts], metrics, rtol=1e-9, atol=1e-12)
