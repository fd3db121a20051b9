import time

import pytest


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
