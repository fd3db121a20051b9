"""The jobs of slurm/ on a real Slurm: two nodes, a learner rank on each, a generator on the second."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
JOBS = sorted((ROOT / "slurm").glob("*.sh"))
LIMIT_S = 280
# What is measured differs from start to start; all else must not.
MEASURED = ("time", "tokens_per_s")


class Job:
    """`sbatch slurm/cpu_smoke.sh` with a run directory of its own."""

    def __init__(self, slurm, name: str, *settings: str, options: tuple[str, ...] = ()) -> None:
        self.slurm, self.directory = slurm, slurm.directory / name
        variables = [f"RUN_DIR={self.directory}", f"VENV={sys.prefix}", "DOCTOR=0", "OMP_NUM_THREADS=1"]
        output = f"--output={slurm.directory}/job-%j.log"
        arguments = [word for setting in settings for word in ("-s", setting)]
        submit = ["sbatch", "--parsable", f"--chdir={ROOT}", output, *options, "slurm/cpu_smoke.sh", *arguments]
        self.id = int(slurm.run("env", f"--chdir={ROOT}", *variables, *submit))

    def log(self) -> str:
        return self.slurm.job_log(self.id)

    def wait(self, *states: str) -> str:
        return self.slurm.wait(self.id, set(states), LIMIT_S)

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + LIMIT_S
        while len(self.lines()) < step:
            assert time.monotonic() < deadline and self.slurm.state(self.id) in ("PENDING", "RUNNING"), self.log()
            time.sleep(0.2)

    def lines(self) -> list[dict]:
        path = self.directory / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def summary(self) -> dict:
        return json.loads((self.directory / "summary.json").read_text())

    def processes(self) -> list[int]:
        """Of this run, on all nodes, as their command lines name its directory or their parents' do."""
        found = subprocess.run(["pgrep", "-f", str(self.directory)], capture_output=True, text=True)
        return [int(pid) for pid in found.stdout.split()]

    def seconds_until_gone(self) -> float:
        start = time.monotonic()
        while self.processes() and time.monotonic() - start < LIMIT_S:
            time.sleep(0.1)
        return time.monotonic() - start


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_jobs_over_two_nodes(slurm):
    """Three jobs of one user on the same nodes at once: one completes; one is asked to save and goes back into the queue,
    with the first one's result in the end; one is cancelled."""
    steps = ("schedule.mode=sync", "schedule.steps=80", "checkpoint.every_steps=30")
    cut, whole = Job(slurm, "cut", *steps), Job(slurm, "whole", *steps)
    cancelled = Job(slurm, "cancelled", "schedule.steps=100000")

    cut.wait_for_step(1)  # at once: it has few steps
    slurm.run("scancel", "--batch", "--signal=TERM", str(cut.id))  # as --signal does when the time limit is near

    cancelled.wait_for_step(3)
    slurm.run("scancel", str(cancelled.id))
    assert cancelled.seconds_until_gone() < 30
    cancelled.wait("CANCELLED", "COMPLETING")
    summary = cancelled.summary()  # although every process was told to end: the step under way is finished and saved
    assert (summary["status"], summary["error"]) == ("interrupted", None)
    assert (cancelled.directory / f"checkpoints/step_{summary['steps']:06d}/metadata.json").is_file()
    whole.wait("COMPLETED")
    cut.wait("COMPLETED")
    assert "back into the queue" in cut.log() and "start 2" in cut.log() and "going on from" in cut.log()
    summaries = [job.summary() for job in (whole, cut)]
    for job, summary in zip((whole, cut), summaries, strict=True):
        assert (summary["status"], summary["steps"]) == ("completed", 80), job.log()
        assert summary["weight_sync"]["mismatches"] == 0 < summary["weight_sync"]["verified"]
        assert [line["step"] for line in job.lines()] == list(range(80))
    assert summaries[0]["eval"] == summaries[1]["eval"]
    for one, other in zip(whole.lines(), cut.lines(), strict=True):
        assert {k: v for k, v in one.items() if not k.startswith(MEASURED)} == {
            k: v for k, v in other.items() if not k.startswith(MEASURED)
        }
    command = [sys.executable, "-m", "megatron_async_rlhf", "verify-weights", str(whole.directory), str(cut.directory)]
    equal = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    assert equal.returncode == 0, equal.stdout + equal.stderr


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.timeout(900)
def test_a_lost_node_ends_the_job_and_its_return_goes_on_with_it(slurm):
    job = Job(slurm, "lost", "schedule.steps=100000", "checkpoint.every_steps=20")
    job.wait_for_step(50)
    pid = int((slurm.directory / "testbed/n2.pid").read_text())
    os.kill(pid, 9)  # slurmd alone: what it started lives on, and nobody tells it to end but its own first machine
    while slurm.state(job.id) == "RUNNING":  # Slurm takes its SlurmdTimeout to notice
        time.sleep(0.1)
    assert job.seconds_until_gone() < 30
    assert job.summary()["status"] == "interrupted"
    made = len(job.lines())
    slurm.start()
    job.wait("RUNNING")
    job.wait_for_step(made + 1)
    assert "going on from" in job.log()
    slurm.run("scancel", str(job.id))
    assert job.seconds_until_gone() < 30


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.timeout(900)
def test_a_time_limit_of_a_minute(slurm):
    """Too little for the steps asked for, enough to make some: with nothing else on the machine."""
    steps = ("schedule.mode=sync", "schedule.steps=150")
    whole = Job(slurm, "unlimited", *steps)
    whole.wait("COMPLETED")
    cut = Job(slurm, "limited", *steps, options=("--time=1",))
    cut.wait("COMPLETED")
    assert "back into the queue" in cut.log()
    assert whole.summary()["eval"] == cut.summary()["eval"]


@pytest.mark.parametrize("mode", ["async", "sync"])
@pytest.mark.parametrize(("nodes", "partition"), [(1, "main"), (2, "main"), (4, "big")])
def test_slurm_accepts_the_gpu_jobs(slurm, mode: str, nodes: int, partition: str):
    script = str(ROOT / f"slurm/llama8b_{mode}.sh")
    slurm.run("sbatch", "--test-only", f"--nodes={nodes}", f"--partition={partition}", script)


@pytest.mark.parametrize("script", JOBS, ids=lambda path: path.name)
def test_scripts_are_sound(script: Path):
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    checked = subprocess.run(["shellcheck", "-x", script], cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["launch.nodes=3"], "launch.nodes = 3, but this Slurm step has 2 nodes; ask for 3 (sbatch --nodes)"),
        (["learner.ranks=3"], "learner.ranks = 3"),
        (["run.device=cuda", "weights.transport=nccl"], "torch sees no GPU here"),
        (["model={hf: nowhere}"], "nowhere"),
    ],
)
def test_wrong_use_is_refused_before_anything_starts(slurm, settings: list[str], says: str):
    job = Job(slurm, f"refused-{abs(hash(says))}", *settings, "launch.join_timeout_s=20")
    job.wait("FAILED")
    lines = [line for line in job.log().splitlines() if line.startswith("error: ")]
    assert lines and says in lines[0], job.log()
    assert not job.directory.exists()


def test_a_job_outside_slurm_says_how_to_submit_it():
    told = subprocess.run(
        ["bash", "slurm/cpu_smoke.sh"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "VENV": sys.prefix},
        capture_output=True,
        text=True,
    )
    assert told.returncode == 2 and told.stderr.startswith("error: submit it: sbatch slurm/cpu_smoke.sh")
