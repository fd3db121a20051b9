import os
import signal
import time

import pytest
from process_tree import command_line, descendants, lives

LEFT_S = 30


@pytest.mark.slow
@pytest.mark.parametrize(
    "victim",
    [
        "learner.0",
        *(pytest.param(each, marks=pytest.mark.thorough) for each in ("learner.1", "generator.0", "controller")),
    ],
)
def test_a_killed_process_ends_the_run_and_is_named(start, victim):
    ranks = 2 if victim == "learner.1" else 1
    run = start("schedule.steps=500", f"learner.tensor_parallel={ranks}", "generator.restarts=0")
    run.wait_for_step(1)
    run.kill(victim)
    killed = time.monotonic()
    output = run.wait()
    assert time.monotonic() - killed < 30
    assert run.process.returncode == 1
    summary = run.summary()
    assert summary["status"] == "failed"
    assert victim in summary["error"]
    assert f"{victim} was killed by SIGKILL" in output


@pytest.mark.slow
@pytest.mark.parametrize("stopped", ["VLLM::EngineCore", pytest.param(None, marks=pytest.mark.thorough)])
def test_nothing_is_left_of_a_run_whose_supervisor_is_killed(start, stopped):
    """Not even of a server that would wait for its engine."""
    run = start("schedule.steps=500")
    run.wait_for_step(2)
    processes = descendants(run.process.pid)
    if stopped is not None:
        os.kill(next(each for each in processes if stopped in command_line(each)), signal.SIGSTOP)
    run.process.kill()
    run.wait()
    deadline = time.monotonic() + LEFT_S
    while (left := [command_line(each) for each in processes if lives(each)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left
    assert run.summary()["status"] == "failed"
