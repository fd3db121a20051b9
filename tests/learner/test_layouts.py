"""Tensor, pipeline and data parallelism change where the arithmetic happens, never what comes out."""

import pytest
import torch
from learner_ranks import MODELS, PACKED, Layout, LayoutRun, make_pairs


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


@pytest.mark.parametrize(("packed", "padded"), PACKED.items())
def test_packed_rows_train_as_padded_ones_do(run: LayoutRun, packed: str, padded: str):
    ours, theirs = run.result(packed), run.result(padded)
    for stage in ("supervised", "preferences"):
        for our_step, their_step in zip(ours[stage], theirs[stage], strict=True):
            for key in ("loss", "grad_norm", "tokens"):
                assert our_step[key] == pytest.approx(their_step[key], rel=1e-5), (stage, key)
    for key in ("logprobs", "preference logprobs"):
        ours_flat, theirs_flat = flat(ours[key]), flat(theirs[key])
        assert len(ours_flat) == len(theirs_flat) > 90
        assert ours_flat == pytest.approx(theirs_flat, rel=1e-5, abs=1e-5)


def flat(values: list | float) -> list[float]:
    return [number for value in values for number in flat(value)] if isinstance(values, list) else [values]


def test_packing_pads_less(single: LayoutRun):
    ours, theirs = (single.result(name)["preferences"][0] for name in ("plain-packed", "plain"))
    rows = make_pairs()[0]
    assert ours["tokens"] == theirs["tokens"] == sum(len(token_ids) - 1 for token_ids, _ in rows)
    assert 0 <= ours["padding"] < 0.1 < theirs["padding"] < 0.5


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
