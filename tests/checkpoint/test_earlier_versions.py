"""Runs that earlier versions left behind: read, planned with, resumed, exported.

`earlier_runs/0.1.0.tar.xz` is what `async-rlhf train` of version 0.1.0 left, but for logs: a tiny synchronous online-DPO run of
3 steps, with rollouts recorded and a checkpoint of step 2. Its configuration is in it.
"""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml

from megatron_async_rlhf.checkpoint.run_state import read_run_state
from megatron_async_rlhf.config.load import load_config
from megatron_async_rlhf.scheduler.recording import RolloutLog
from megatron_async_rlhf.telemetry.files import METRICS, ROLLOUT_DIR, read_steps

RUNS = sorted((Path(__file__).parent / "earlier_runs").glob("*.tar.xz"))


@pytest.fixture(params=RUNS, ids=lambda path: path.name.removesuffix(".tar.xz"))
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    with tarfile.open(request.param) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "run"


def command(*arguments: object, limit_s: float = 120) -> str:
    program = [sys.executable, "-m", "megatron_async_rlhf", *map(str, arguments)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=limit_s)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_its_configuration_state_and_rollouts_are_read(run: Path):
    config = load_config(run / "config.yaml")
    assert config.schedule.steps == 3 and config.rewards[0].type == "builtin"
    state = read_run_state(run / "checkpoints/step_000002")
    assert state.controller.version == 2 and state.totals.steps == 2
    rollouts = list(RolloutLog(run / ROLLOUT_DIR).read(end=3))
    assert [rollout.command.version for rollout in rollouts] == [0, 1, 2]
    assert all(rollout.command.mini_batches[0][0].sequences for rollout in rollouts)
    assert [line["step"] for line in read_steps(run / METRICS)] == [1, 2, 3]


def test_its_checkpoints_are_exported(run: Path, tmp_path: Path):
    command("export-hf", run, tmp_path / "policy")
    exported, made_then = (path / "model.safetensors" for path in (tmp_path / "policy", run / "checkpoints/final"))
    assert exported.read_bytes() == made_then.read_bytes()
    command("export-hf", run / "checkpoints/step_000002", tmp_path / "earlier")
    assert (tmp_path / "earlier/model.safetensors").read_bytes() != made_then.read_bytes()


def interrupted(run: Path, steps: int) -> Path:
    """The configuration of the same run as if it had been cut off, with more steps to make."""
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"status": "interrupted"}))
    tree = yaml.safe_load((run / "config.yaml").read_text())
    tree["run"]["dir"], tree["schedule"]["steps"] = str(run), steps
    path = run.parent / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_it_can_be_planned_to_go_on(run: Path):
    assert "continuing from" in command("train", interrupted(run, 5), "--resume", "--dry-run")


@pytest.mark.slow
@pytest.mark.thorough
def test_it_goes_on(run: Path):
    command("train", interrupted(run, 5), "--resume", limit_s=240)
    assert [line["step"] for line in read_steps(run / METRICS)] == [1, 2, 3, 4, 5]
    assert json.loads((run / "summary.json").read_text())["status"] == "completed"


@pytest.mark.slow
@pytest.mark.skipif(
    os.environ.get("ASYNC_RLHF_TEST_THOROUGH") != "1",
    reason="equal bits need the kind of processor that it was made on",
)
def test_it_is_replayed(run: Path):
    assert "equal: " in command("replay", run, limit_s=240)
