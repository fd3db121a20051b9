"""The same pushes between GPUs. Skipped without them; `tools/bench_weights.py --transport ...` measures them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[2] / "tools/bench_weights.py"
SMALL = ["--layers", "2", "--hidden", "256", "--ffn", "512", "--vocab", "1001", "--staging-mib", "1", "--repeats", "2"]


def run(tmp_path: Path, *arguments: str) -> dict:
    result = tmp_path / "result.json"
    subprocess.run([sys.executable, str(BENCH), *SMALL, *arguments, "--json", str(result)], check=True, timeout=250)
    return json.loads(result.read_text())


def assert_verified(result: dict) -> None:
    """A verified push raises on its own if a digest differs."""
    verified = result["medians"]["shards, verified"]
    assert verified["wire"] == result["bytes_minimum"]


@pytest.mark.slow
@pytest.mark.thorough  # tests/e2e/test_weight_pushes.py has pushes over gloo
def test_over_gloo_for_comparison(tmp_path):
    assert_verified(run(tmp_path, "--learner", "2", "1", "1", "--generator", "1", "--replicas", "2"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA IPC needs an NVIDIA GPU")
def test_learner_and_generators_on_one_gpu(tmp_path):
    assert_verified(run(tmp_path, "--transport", "ipc", "--dtype", "bfloat16", "--learner", "1", "2", "1"))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs a GPU for each of two ranks")
def test_learner_and_generator_on_a_gpu_each(tmp_path):
    layout = ["--learner", "1", "1", "1", "--generator", "1"]
    assert_verified(run(tmp_path, "--transport", "nccl", "--dtype", "bfloat16", *layout))
