"""A part of a running job is stopped (SIGSTOP), alone: it neither ends nor answers. The run continues, or says who it was."""

import json
import os
import signal
import time

import pytest
from process_tree import command_line, descendants

LIMITS = (
    "generator.request_timeout_s=25",
    "generator.probe_timeout_s=5",
    "weights.timeout_s=8",
    "learner.timeout_s=25",
    "launch.pin_cores=false",
)
# To notice, to start a server again, whose first answer takes long, and to continue.
RECOVERY_S = 200


def stop(run, name: str, part: str) -> None:
    """Stop the process of `name` whose command has `part` in it; empty: the first one."""
    pid = json.loads((run.directory / "logs/processes.json").read_text())[name]
    (found, *_) = [each for each in descendants(pid) if part in command_line(each)]
    os.kill(found, signal.SIGSTOP)


PARTS = {"engine": ("VLLM::EngineCore", 1), "worker": ("VLLM::Worker_TP1", 2), "api server": ("", 1)}


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("part", "replicas"),
    [
        ("engine", 1),
        pytest.param("engine", 2, marks=pytest.mark.thorough),
        pytest.param("worker", 1, marks=pytest.mark.thorough),
        pytest.param("worker", 2, marks=pytest.mark.thorough),
        pytest.param("api server", 1, marks=pytest.mark.thorough),
        pytest.param("api server", 2, marks=pytest.mark.thorough),
    ],
)
def test_a_stopped_part_of_a_generator_costs_a_restart(start, part, replicas):
    process, tensor_parallel = PARTS[part]
    steps = 20
    run = start(
        *LIMITS,
        f"generator.replicas={replicas}",
        f"generator.tensor_parallel={tensor_parallel}",
        f"schedule.steps={steps}",
    )
    run.wait_for_step(3)
    stop(run, f"generator.{replicas - 1}", process)
    stopped = time.monotonic()
    output = run.wait()
    assert run.process.returncode == 0, output
    assert time.monotonic() - stopped < RECOVERY_S, output
    assert f"generator.{replicas - 1}: " in output and "; killed" in output, output
    assert f"generator.{replicas - 1} was killed by SIGKILL; started again (1 of 3)" in output
    summary = run.summary()
    assert (summary["status"], summary["steps"]) == ("completed", steps)
    parts = ("samples_trained", "samples_not_selected", "samples_cancelled")
    assert summary["samples_generated"] == sum(summary[part] for part in parts)
    assert summary["weight_sync"]["mismatches"] == 0


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("replicas", [1, 2])
def test_a_stopped_learner_rank_ends_the_run_and_is_named(start, rank, replicas):
    run = start(*LIMITS, f"generator.replicas={replicas}", "learner.tensor_parallel=2", "schedule.steps=500")
    run.wait_for_step(2)
    stop(run, f"learner.{rank}", "")
    stopped = time.monotonic()
    output = run.wait()
    assert time.monotonic() - stopped < 2 * 25 + 20, output
    assert run.process.returncode == 1
    assert f"learner.{rank}" in run.summary()["error"], output


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.timeout(400)
def test_a_learner_that_dies_beside_a_stopped_generator_is_not_kept_waiting(start):
    run = start(*LIMITS, "generator.replicas=2", "schedule.steps=40", "checkpoint.every_steps=2")
    run.wait_for_step(3)
    stop(run, "generator.1", "")
    run.kill("learner.0")
    stopped = time.monotonic()
    output = run.wait()
    assert run.process.returncode == 0, output
    assert time.monotonic() - stopped < RECOVERY_S, output
    assert "continuing from step 2 (run.max_restarts: 1 of 3)" in output
    assert run.summary()["steps"] == 40
