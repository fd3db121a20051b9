"""Real runs on a disk that fills up, in each phase, and that continue once there is room."""

import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest


@pytest.fixture
def small_disk(tmp_path):
    """2.6 MB for the run directory: a checkpoint, and not another."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2600k", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.slow
@pytest.mark.thorough
def test_a_disk_that_is_full_in_mid_checkpoint(small_disk, start):
    settings = (
        "checkpoint.every_steps=1",
        "checkpoint.keep_last=null",
        "schedule.mode=sync",
        "checkpoint.async_save=false",
    )
    run = start(*settings, "schedule.steps=50")
    output = run.wait()
    assert run.process.returncode == 1, output
    places = run.directory / "checkpoints"
    error = (
        f"checkpoint {places / 'step_000002.partial'} could not be written (learner.0: OSError: [Errno 28] No space left on "
        "device); make room there, then continue with --resume"
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
    assert f"continuing from {places / 'step_000001'}" in output
    assert [line["step"] for line in rest.lines("metrics.jsonl")] == [1, 2, 3]
    assert rest.summary()["status"] == "completed"


@pytest.mark.slow
@pytest.mark.thorough
def test_a_disk_that_is_full_at_the_start(small_disk, start):
    """Nothing is started; with room the same command runs."""
    filler = small_disk / "filler"
    with pytest.raises(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(2**16)):
            pass
    run = start("schedule.steps=1")
    output = run.wait()
    assert run.process.returncode in (1, 2), output
    assert sum("No space left" in line for line in output.splitlines()) == 1 and "Traceback" not in output, output
    assert "start\n" not in output.splitlines(), output


# Whose writes fail, to which files of the run directory.
FILES = {
    "metrics": ("controller", ["metrics.jsonl"]),
    "samples": ("controller", ["samples.jsonl"]),
    "trace": ("controller", ["trace.json", "trace.json.partial"]),
    "export": ("learner.0", ["checkpoints/final/shard-0.partial"]),
}


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.parametrize("phase", list(FILES))
def test_a_disk_that_is_full_for_one_file(start, phase: str):
    """As it is when that file is the first that finds no room."""
    if shutil.which("strace") is None:
        pytest.skip("writes are made to fail by strace, which is not installed")
    settings = ("checkpoint.every_steps=1", "schedule.mode=sync")
    name, files = FILES[phase]
    run = start(*settings, "schedule.steps=12")
    run.wait_for_step(2)
    with no_room(run.pid(name), [run.directory / file for file in files]):
        output = run.wait()
    assert run.process.returncode == 1, output
    told = [line for line in output.splitlines() if "No space left" in line]
    assert len(told) == 1 and files[0].rpartition("/")[2].partition(".")[0] in told[0].replace("final", "shard-0"), (
        output
    )
    assert "Traceback" not in output
    assert run.summary()["status"] == "failed" and "No space left" in run.summary()["error"]

    rest = start(*settings, "schedule.steps=12", resume=run.directory)
    output = rest.wait()
    assert rest.process.returncode == 0, output
    assert [line["step"] for line in rest.lines("metrics.jsonl")] == list(range(1, 13))
    assert {line["step"] for line in rest.lines("samples.jsonl")} == set(range(1, 13))
    assert (rest.directory / "trace.json").stat().st_size > 0
    assert (rest.directory / "checkpoints/final/model.safetensors").is_file()


@contextmanager
def no_room(pid: int, paths: list[Path]):
    """While it lasts, whatever this process writes to these files finds no room."""
    calls = "write,pwrite64,writev,openat"
    places = [word for path in paths for word in ("-P", str(path))]
    inject = ["-e", f"trace={calls}", "-e", f"inject={calls}:error=ENOSPC"]
    with subprocess.Popen(["strace", "-f", "-qq", "-o", "/dev/null", *inject, *places, "-p", str(pid)]) as strace:
        yield
        strace.terminate()
