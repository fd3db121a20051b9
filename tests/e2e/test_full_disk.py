"""A real run on a disk that fills up in the middle of a checkpoint, and goes on once there is room."""

import subprocess

import pytest


@pytest.fixture
def small_disk(tmp_path):
    """3 MB for the run directory: a checkpoint, and not another."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.slow
@pytest.mark.thorough
def test_a_disk_that_is_full_in_mid_checkpoint(small_disk, start):
    settings = ("checkpoint.every_steps=1", "checkpoint.keep_last=null", "schedule.mode=sync")
    run = start(*settings, "schedule.steps=50")
    output = run.wait()
    assert run.process.returncode == 1, output
    places = run.directory / "checkpoints"
    error = (
        f"checkpoint {places / 'step_000002.partial'} could not be written (learner.0: OSError: [Errno 28] No space left on "
        "device); make room there, then go on with --resume"
    )
    assert sum("No space left" in line for line in output.splitlines()) == 1
    assert f"error: {error}\n" in output and "Traceback" not in output
    summary = run.summary()
    assert (summary["status"], summary["error"]) == ("failed", error)
    assert summary["steps"] >= 2 and "log_tail" not in summary
    assert {path.name for path in places.iterdir()} == {"reference", "step_000001"}
    assert (run.directory / "trace.json").stat().st_size > 0

    subprocess.run(["mount", "-o", "remount,size=30m", small_disk], check=True)
    rest = start(*settings, "schedule.steps=3", resume=run.directory)
    output = rest.wait()
    assert rest.process.returncode == 0, output
    assert f"going on from {places / 'step_000001'}" in output
    assert [line["step"] for line in rest.lines("metrics.jsonl")] == [0, 1, 2]
    assert rest.summary()["status"] == "completed"
