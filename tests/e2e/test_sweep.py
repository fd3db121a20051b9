"""`async-rlhf sweep` with real runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

CONFIG = Path(__file__).with_name("tiny.yaml")
AXES = {"beta": {"algorithm.beta": [0.1, 0.5]}, "updates": {"schedule.mini_batches": [1, 2]}}
SKIP = [{"beta": 0.1, "updates": 2}, {"beta": 0.5, "updates": 1}]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.thorough
def test_two_points_start_from_one_policy(tmp_path: Path):
    tree = yaml.safe_load(CONFIG.read_text())
    tree["schedule"]["mode"] = "sync"
    tree["sweep"] = {"axes": AXES, "skip": SKIP}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "megatron_async_rlhf", "sweep", "sweep.yaml", "-s", "run.dir=here"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    first, second = json.loads((tmp_path / "here/results.json").read_text())["points"]
    assert (first["status"], second["status"]) == ("completed", "completed")
    assert first["reward_before"] == second["reward_before"]
    assert (first["staleness_max"], second["staleness_max"]) == (0, 1)
    assert first["loss_finite"] and second["loss_finite"]
    assert first["samples"] == second["samples"] == 4 * 8 * 3
    assert (tmp_path / "here/sweep.svg").stat().st_size > 0
    again = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert (again.returncode, again.stdout.splitlines()[0]) == (0, "2 of 2 points are completed, 0 to do")
