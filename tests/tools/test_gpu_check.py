"""The parts of `tools/gpu_check.py` that need no GPU, as a user starts them."""

import importlib.util
import json
import os
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


# As on a machine whose learners miss a library.
WITHOUT_MEGATRON = """
import sys
from pathlib import Path
if b"megatron_async_rlhf.learner.megatron.worker" in Path("/proc/self/cmdline").read_bytes():
    sys.modules["megatron"] = None
"""
MISSING = "No module named 'megatron.core'; 'megatron' is not a package"


@pytest.mark.slow
@pytest.mark.thorough
def test_a_run_that_fails_is_kept_and_its_first_cause_shown(tmp_path: Path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "sitecustomize.py").write_text(WITHOUT_MEGATRON)
    told = subprocess.run(
        [sys.executable, str(CHECK), "--device", "cpu", "run", "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"PYTHONPATH": f"{broken}:{CHECK.parents[1]}"},
    )
    assert told.returncode == 1, told.stdout + told.stderr
    report = json.loads((tmp_path / "out/gpu_check.json").read_text())
    assert any(line.startswith("the run ended with 1: learner.0") for line in report["run"]["log"])
    assert f"ModuleNotFoundError: {MISSING}" in report["run"]["log"]
    log = tmp_path / "out/gpu_check_run/logs/learner.0.log"
    assert f"{log}:" in told.stdout
    assert MISSING in log.read_text()


VLLM_LOG = """\
INFO 11-26 23:10:01 [core.py:100] Initializing a V1 LLM engine
(EngineCore pid=77) ERROR 11-26 23:10:09 [core.py:1100] EngineCore failed to start.
(EngineCore pid=77) ERROR 11-26 23:10:09 [core.py:1100] Traceback (most recent call last):
(EngineCore pid=77) ERROR 11-26 23:10:09 [core.py:1100]   File "core.py", line 7, in run_engine_core
(EngineCore pid=77) ERROR 11-26 23:10:09 [core.py:1100]     engine = EngineCore()
(EngineCore pid=77) ERROR 11-26 23:10:09 [core.py:1100] AssertionError: Error in memory profiling.
(APIServer pid=70) Traceback (most recent call last):
(APIServer pid=70) RuntimeError: Engine core initialization failed. See root cause above.
"""


def test_the_first_exception_of_a_vllm_server_is_found_behind_its_prefixes(tmp_path: Path):
    spec = importlib.util.spec_from_file_location("gpu_check", CHECK)
    gpu_check = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = gpu_check  # dataclasses look their module up
    spec.loader.exec_module(gpu_check)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/generator.0.log").write_text(VLLM_LOG)
    (tmp_path / "logs/controller.log").write_text("Traceback (most recent call last):\nRunError: generator.0 ended\n")
    kept, where, *frames = gpu_check.first_causes(tmp_path)
    assert kept.endswith(str(tmp_path))
    assert where == f"{tmp_path}/logs/generator.0.log:3: first exception:"
    assert frames[2].endswith("AssertionError: Error in memory profiling.")
    assert frames[-1] == "RunError: generator.0 ended"
    assert not any("Engine core initialization failed" in line for line in frames)


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
