"""Tensor, pipeline and data parallelism change where the arithmetic happens, never what comes out."""

import pytest
import torch
from learner_ranks import (
    ALONE,
    LONG_STEPS,
    MODELS,
    PEAK_TFLOPS,
    VOCAB_SIZE,
    Layout,
    LayoutRun,
    make_pairs,
)

from megatron_async_rlhf.config.sections import ModelSection
from megatron_async_rlhf.models.architecture import architecture_of
from megatron_async_rlhf.models.flops import forward_flops


def test_fresh_weights_are_the_same_bits_in_every_layout(run: LayoutRun, single: LayoutRun):
    ours, theirs = run.weights("plain", "initial"), single.weights("plain", "initial")
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("stage", ["supervised", "preferences"])
def test_the_same_loss_and_gradient_norm(run: LayoutRun, single: LayoutRun, name: str, stage: str):
    ours, theirs = run.result(name)[stage], single.result(name)[stage]
    assert len(ours) == 3
    for our_step, their_step in zip(ours, theirs, strict=True):
        for key in ("loss", "grad_norm", "learning_rate"):
            assert our_step[key] == pytest.approx(their_step[key], rel=1e-4), key


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("stage", ["warm", "final"])
def test_the_same_weights_after_training(run: LayoutRun, single: LayoutRun, name: str, stage: str):
    ours, theirs = run.weights(name, stage), single.weights(name, stage)
    before = single.weights(name, "initial" if stage == "warm" else "warm")
    assert set(ours) == set(theirs)
    for key, tensor in theirs.items():
        gap = (ours[key] - tensor).abs().max()
        moved = (tensor - before[key]).abs().max()
        assert moved > 0, key
        assert gap <= 1e-4 * tensor.abs().max(), key
        assert gap <= 0.05 * moved, key  # the bound above would miss a tensor that training left alone


def test_the_same_loss_and_gradient_norm_over_many_steps(run: LayoutRun, single: LayoutRun):
    ours, theirs = run.ranks[0]["long run"], single.ranks[0]["long run"]
    assert len(ours) == LONG_STEPS
    for our_step, their_step in zip(ours, theirs, strict=True):
        for key in ("loss", "grad_norm", "learning_rate"):
            assert our_step[key] == pytest.approx(their_step[key], rel=1e-4), key


@pytest.mark.parametrize(("alone", "packed"), ALONE.items())
def test_packed_sequences_train_as_each_does_alone(run: LayoutRun, alone: str, packed: str):
    """To float32's last digits from the same weights; what training makes of those digits is bounded more widely."""
    ours, theirs = run.result(packed), run.result(alone)
    for key in ("loss", "grad_norm", "tokens"):
        assert ours["supervised"][0][key] == pytest.approx(theirs["supervised"][0][key], rel=1e-5), key
        for stage in ("supervised", "preferences"):
            for our_step, their_step in zip(ours[stage], theirs[stage], strict=True):
                assert our_step[key] == pytest.approx(their_step[key], rel=1e-4), (stage, key)
    for key, tolerance in (("logprobs", 1e-5), ("preference logprobs", 1e-4)):
        ours_flat, theirs_flat = flat(ours[key]), flat(theirs[key])
        assert len(ours_flat) == len(theirs_flat) > 90
        assert ours_flat == pytest.approx(theirs_flat, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize(("alone", "packed"), ALONE.items())
def test_packed_sequences_have_the_gradients_of_each_alone(run: LayoutRun, alone: str, packed: str):
    if run.layout.distributed_optimizer:
        pytest.skip("a rank's buffer holds whole gradients of its share of the parameters only")
    for rank in range(run.layout.ranks):
        ours, theirs = run.gradients(packed, rank), run.gradients(alone, rank)
        assert set(ours) == set(theirs)
        for name, gradient in theirs.items():
            assert gradient.abs().max() > 0, name
            assert (ours[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


def flat(values: list | float) -> list[float]:
    return [number for value in values for number in flat(value)] if isinstance(values, list) else [values]


def test_only_what_ranks_must_divide_is_padded(run: LayoutRun):
    step = run.result("plain")["preferences"][0]
    rows = make_pairs()[0]
    assert step["tokens"] == sum(len(token_ids) - 1 for token_ids, _ in rows)
    # Beside the tokens that keep a rank without a pair in step, at most one for each of these micro-batches.
    assert step["padding"] <= (0.1 if run.layout.sequence_parallel else 0)


@pytest.mark.parametrize("name", MODELS)
def test_every_rank_reports_the_same_metrics(run: LayoutRun, name: str):
    for rank in run.ranks:
        assert rank[name]["supervised"] == run.result(name)["supervised"]
        assert rank[name]["preferences"] == run.result(name)["preferences"]


@pytest.mark.parametrize("name", MODELS)
def test_norms_stay_the_same_bits_on_all_ranks_of_a_stage(run: LayoutRun, name: str):
    """Above only the exported copies are seen. A tensor-parallel rank has the gradients of its own heads only."""
    ranks_per_stage = run.layout.tensor * run.layout.data
    for stage in range(run.layout.pipeline):
        first, *others = run.ranks[stage * ranks_per_stage : (stage + 1) * ranks_per_stage]
        norms = {key: value for key, value in first[name]["digests"].items() if "norm" in key}
        assert ("qwen3" in name) == any("k_layernorm" in key for key in norms)
        for other in others:
            assert norms.items() <= other[name]["digests"].items()


def test_a_step_says_where_its_time_went(run: LayoutRun):
    result = run.result("plain")
    measured, rows = result["measured"], make_pairs()[0]
    for name in ("reference", "gradient reduction", "gradient norm", "optimizer"):
        assert name in result["span names"]
    working = sum(measured[f"time/{part}_s"] for part in ("reference", "forward_backward", "optimizer"))
    assert 0 <= measured["time/gradient_reduction_s"] <= measured["time/forward_backward_s"] <= working
    assert measured["tokens_per_s"] * working == pytest.approx(measured["tokens"])
    arch = architecture_of(ModelSection.model_validate(run.sources["plain"]["section"]), VOCAB_SIZE)
    lengths, outputs = [len(ids) - 1 for ids, _ in rows], sum(len(ids) - prompt for ids, prompt in rows)
    # Forward, backward twice that, and the reference's forward, as a share of what all ranks could do.
    share = 4 * forward_flops(arch, lengths, outputs) / (working * PEAK_TFLOPS * 1e12 * run.layout.ranks)
    assert measured["model_flops_utilisation"] == pytest.approx(share)


def test_recomputation_runs_what_it_says_a_second_time(run: LayoutRun):
    twice = {"none": [], "selective": ["attention"], "full": ["attention", "mlp"]}[run.layout.recompute]
    for rank in run.ranks:
        for name in MODELS:
            assert rank[name]["runs"] == {part: 2 if part in twice else 1 for part in ("attention", "mlp")}


@pytest.mark.parametrize("name", MODELS)
def test_recomputation_changes_no_bit(run_of, single: LayoutRun, name: str):
    recomputed = run_of(Layout(recompute="full"))
    for stage in ("supervised", "preferences", "preference logprobs"):
        assert recomputed.result(name)[stage] == single.result(name)[stage]
    ours, theirs = recomputed.weights(name, "final"), single.weights(name, "final")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("name", MODELS)
def test_data_parallel_ranks_hold_the_same_bits_after_each_updated_its_share(run_of, single: LayoutRun, name: str):
    first, second = run_of(Layout(data=2, distributed_optimizer=True)).ranks
    assert first[name]["digests"] == second[name]["digests"]
    whole = single.result(name)["adam state"]
    assert first[name]["adam state"] + second[name]["adam state"] == whole
    assert max(first[name]["adam state"], second[name]["adam state"]) <= 0.55 * whole  # padding lies at the end
