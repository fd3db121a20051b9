"""The parts of `tools/gpu_check.py` that need no GPU, as a user starts them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CHECK = Path(__file__).parents[2] / "tools/gpu_check.py"


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", str(CHECK), *arguments], capture_output=True, text=True, timeout=250
    )


@pytest.mark.slow
def test_parts_without_a_gpu(tmp_path: Path):
    told = check("--device", "cpu", "packed", "speed", "push", "--out", str(tmp_path))
    assert told.returncode == 0, told.stdout + told.stderr
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert report["device"] == {"device": "cpu"}
    assert report["versions"]["torch"]
    checks = {name: (value, held) for name, value, _, held in report["packed"]["checks"]}
    assert len(checks) == 3 and all(held for _, held in checks.values())
    assert checks["loss: packed against alone, relative"][0] > 0  # other sums of bf16 numbers: it did compare two
    assert report["speed"]["figures"]["bf16"]["tokens_per_s"] > 0
    assert "bench_weights.py" in report["push"]["skipped"]
    assert "push      skipped: " in told.stdout


def test_a_part_that_fails_ends_with_1_and_shows_its_log(tmp_path: Path):
    # As on a machine with a broken installation.
    (tmp_path / "torch.py").write_text("raise ImportError('a broken torch')")
    told = subprocess.run(
        [sys.executable, str(CHECK), "--device", "cpu", "packed", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=100,
        env={"PYTHONPATH": f"{tmp_path}:{CHECK.parents[1]}", "PATH": "/usr/bin:/bin"},
    )
    assert told.returncode == 1, told.stdout + told.stderr
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert report["packed"]["failed"] == "1"
    assert any("a broken torch" in line for line in report["packed"]["log"])
    assert "a broken torch" in told.stdout


def test_an_unknown_part_is_refused(tmp_path: Path):
    told = check("--device", "cpu", "logit", "--out", str(tmp_path))
    assert told.returncode == 2
    assert "no such part: logit; there are logits, packed" in told.stderr
    assert not (tmp_path / "gpu_check.json").exists()


def test_a_machine_without_gpus_is_told_what_else_to_run(tmp_path: Path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    told = check("packed", "--out", str(tmp_path))
    assert told.returncode == 1
    assert "--device cpu" in told.stderr
