"""Which run measures a machine, and what becomes of it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_async_rlhf.cli import app
from megatron_async_rlhf.config.load import load_config
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.estimate.generator_memory import GIB
from megatron_async_rlhf.estimate.machines import machine_of
from megatron_async_rlhf.plan import measuring
from megatron_async_rlhf.plan.measuring import measuring_config
from megatron_async_rlhf.simulate.prediction import shape_of

ROOT = Path(__file__).parents[2]
LLAMA, QUICKSTART = ROOT / "examples" / "llama8b_async.yaml", ROOT / "examples" / "quickstart.yaml"


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)


def config_for(path: Path, directory: Path, *overrides: str):
    task = load_config(path, overrides)
    return measuring_config(task, shape_of(task), directory)


@pytest.mark.parametrize(("gpus", "transport"), [(1, "ipc"), (8, "nccl")])
def test_gpus_are_shared_where_there_is_only_one(tmp_path, monkeypatch, gpus, transport):
    monkeypatch.setattr(measuring, "gpus_here", lambda: gpus)
    config = config_for(LLAMA, tmp_path)
    assert config.weights.transport == transport and config.learner.precision == "bf16"
    assert (config.model.layers, config.model.hidden_size, config.model.ffn_size) == (4, 4096, 14336)
    assert config.learner.world_size == config.generator.workers == 1
    assert config.schedule.staleness_bound == 0


def test_threads_have_the_cores_that_are_here(tmp_path, monkeypatch):
    monkeypatch.setattr(measuring.os, "sched_getaffinity", lambda pid: set(range(8)))
    one, four = (config_for(QUICKSTART, tmp_path, f"learner.threads={threads}") for threads in (1, 4))
    assert machine_of(four).learner == 4 * machine_of(one).learner


def test_without_a_gpu_there_is_nothing_to_measure(tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "gpus_here", lambda: 0)
    with pytest.raises(ConfigError, match="nvidia-smi finds no GPU here"):
        config_for(LLAMA, tmp_path)


def test_a_wide_model_loses_layers_until_it_fits(tmp_path, monkeypatch):
    wide = (
        "model={layers: 40, hidden_size: 4096, ffn_size: 14336, heads: 32, kv_heads: 8, context_length: 512}",
        "learner.micro_batch_tokens=2048",
    )
    layers = []
    for gib in (64, 24, 16):
        monkeypatch.setattr(measuring, "machine_memory", lambda gib=gib: gib * GIB)
        layers.append(config_for(QUICKSTART, tmp_path, *wide).model.layers)
    assert layers == sorted(layers, reverse=True) and layers[0] == 4 and layers[-1] < 4
    monkeypatch.setattr(measuring, "machine_memory", lambda: 4 * GIB)
    with pytest.raises(ConfigError, match="not even one layer of this model, 4096 wide, fits 4 GiB here"):
        config_for(QUICKSTART, tmp_path, *wide)


def test_there_are_as_many_prompts_as_there_is_time_for(tmp_path):
    small, large = (
        config_for(QUICKSTART, tmp_path, f"model.hidden_size={size}", f"model.ffn_size={3 * size}")
        for size in (128, 2048)
    )
    assert small.schedule.prompts_per_step == 96 > large.schedule.prompts_per_step >= 1


def test_one_source_of_speeds_is_enough(tmp_path):
    result = CliRunner().invoke(app, ["plan", str(QUICKSTART), "--measure", "--from-run", str(tmp_path)])
    assert isinstance(result.exception, ConfigError)
    assert "--measure and --from-run both say how fast machines are" in str(result.exception)


@pytest.mark.thorough
@pytest.mark.timeout(600)
def test_a_machine_is_measured():
    result = CliRunner().invoke(
        app, ["plan", str(QUICKSTART), "--measure", "--gpus-per-node", "4", "--json", "--best", "1"]
    )
    assert result.exit_code == 0, result.output
    plans = json.loads(result.stdout)
    assert {plan["schedule"] for plan in plans} == {"one_step", "bounded", "sync"}


def test_a_family_with_heads_of_any_size_is_measured_with_heads_that_divide(tmp_path, monkeypatch):
    """Qwen3-4B has 32 heads of 128 numbers beside a hidden size of 2,560."""
    monkeypatch.setattr(measuring, "gpus_here", lambda: 8)
    task = load_config(LLAMA)
    arch = replace(shape_of(task), hidden_size=2560, heads=32, kv_heads=8, head_dim=128)
    model = measuring_config(task, arch, tmp_path).model
    assert (model.hidden_size, model.heads, model.kv_heads) == (2560, 20, 5)
