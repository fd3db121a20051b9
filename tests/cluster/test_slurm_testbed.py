"""tools/slurm_testbed.sh is Slurm enough for the tests that rely on it."""

import os
import subprocess
import time
from pathlib import Path


def running(job: int, slurm) -> set[int]:
    """Processes that have the environment of the job, wherever in the tree they are; zombies have none."""
    marks = {f"SLURM_JOB_ID={job}", f"SLURM_CONF={slurm.environment['SLURM_CONF']}"}
    found = set()
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            environment = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if marks <= set(environment):
            found.add(int(path.parent.name))
    return found


def until(true, timeout: float, what: str) -> None:
    end = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < end, f"not within {timeout} s: {what}"
        time.sleep(0.1)


def test_each_node_runs_its_step_of_a_job(slurm) -> None:
    job = slurm.sbatch("srun --ntasks-per-node=1 bash -c 'echo $SLURM_NODEID $SLURMD_NODENAME'", "--nodes=2")
    slurm.wait(job, "COMPLETED", 20)
    assert sorted(slurm.job_log(job).splitlines()) == ["0 n1", "1 n2"]


def test_a_second_start_leaves_jobs_alone(slurm) -> None:
    job = slurm.sbatch("sleep 600")
    slurm.wait(job, "RUNNING", 10)
    assert slurm.start() == f"export SLURM_CONF={slurm.environment['SLURM_CONF']}"
    assert slurm.state(job) == "RUNNING"
    slurm.run("scancel", str(job))


def test_cancelling_leaves_no_process(slurm) -> None:
    """Neither one with a session of its own nor one whose parent is gone, on either node, though both ignore SIGTERM."""
    pids = slurm.directory / "pids"
    pids.mkdir()
    stay, task = slurm.directory / "stay.sh", slurm.directory / "task.sh"
    stay.write_text(f"trap '' TERM\ntouch {pids}/$$\nwhile true; do sleep 1; done\n")
    escape = f"setsid bash {stay} &\n( setsid bash {stay} & )"
    task.write_text(f"{escape}\nwait\n")
    job = slurm.sbatch(f"{escape}\nsrun --ntasks-per-node=1 bash {task} &\nwait", "--nodes=2")
    until(lambda: len(list(pids.iterdir())) == 6, 20, "six processes have started")
    escaped = {int(path.name) for path in pids.iterdir()}
    assert all(os.getsid(pid) == pid for pid in escaped) and escaped <= running(job, slurm)
    slurm.run("scancel", str(job))
    until(lambda: not running(job, slurm), 30, "all processes of the job have ended")


def test_a_requeued_job_runs_again_soon(slurm) -> None:
    job = slurm.sbatch("echo run ${SLURM_RESTART_COUNT:-0}\n[[ $SLURM_RESTART_COUNT ]] || sleep 600")
    until(lambda: "run 0" in slurm.job_log(job), 10, "the job has started")
    slurm.scontrol("requeue", str(job))
    slurm.wait(job, "COMPLETED", 30)  # Slurm would have it wait for two minutes, had the testbed not set cred_expire
    assert "run 1" in slurm.job_log(job).splitlines()


def test_jobs_for_gpus_that_are_not_there_are_checked(slurm) -> None:
    def check(*args: str) -> subprocess.CompletedProcess:
        command = ["sbatch", "--test-only", *args, "--wrap=true"]
        return subprocess.run(command, env=slurm.environment, capture_output=True, text=True, timeout=60)

    assert " on nodes n[1-2] " in check("--nodes=2", "--gpus-per-node=8").stderr
    assert " on nodes big[1-4] " in check("--nodes=4", "--gpus-per-node=8", "--partition=big").stderr
    assert check("--gpus-per-node=9").returncode != 0
