"""A real Slurm on this machine (tools/slurm_testbed.sh) with two nodes, n1 and n2, for all tests of a session."""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

TESTBED = Path(__file__).parents[2] / "tools" / "slurm_testbed.sh"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")


@dataclass(frozen=True)
class Slurm:
    """Its commands. Each has a minute, and fails with what it printed."""

    directory: Path
    environment: dict[str, str]

    def start(self) -> str:
        """Starts it unless it is up; returns the last line that tells how to find it."""
        return self.run(str(TESTBED), "start", str(self.directory / "testbed")).splitlines()[-1]

    def run(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def sbatch(self, script: str, *args: str) -> int:
        """Submits the text of a bash script; returns the job's id."""
        path = Path(tempfile.mkstemp(suffix=".sh", dir=self.directory)[1])
        path.write_text(f"#!/bin/bash\n{script}\n")
        log = f"--output={self.directory}/job-%j.log"
        return int(self.run("sbatch", "--parsable", "--open-mode=append", log, *args, str(path)))

    def scontrol(self, *args: str) -> str:
        return self.run("scontrol", *args)

    def state(self, job: int) -> str:
        """PENDING, RUNNING, COMPLETING, COMPLETED, FAILED, CANCELLED ..."""
        return self.run("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T").strip()

    def wait(self, job: int, states: str | set[str], timeout: float) -> str:
        """Returns the state reached, one of `states`; fails after `timeout` seconds."""
        wanted = {states} if isinstance(states, str) else states
        end = time.monotonic() + timeout
        while (state := self.state(job)) not in wanted:
            shown = f"job {job} is {state} after {timeout} s, not {' or '.join(sorted(wanted))}"
            assert time.monotonic() < end, f"{shown}\n{self.job_log(job)}"
            time.sleep(0.2)
        return state

    def job_log(self, job: int) -> str:
        """What the job has printed so far."""
        path = self.directory / f"job-{job}.log"
        return path.read_text() if path.exists() else ""


def can_be_had() -> bool:
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    return all(shutil.which(name, path=path) for name in PROGRAMS) or (
        os.geteuid() == 0 and shutil.which("apt-get", path=path) is not None
    )


@pytest.fixture(scope="session")
def launch_python() -> Path:
    """Of an environment that has NeMo-Run."""
    python = Path(os.environ.get("ASYNC_RLHF_LAUNCH_ENV", TESTBED.parents[1] / ".venv-launch")) / "bin/python"
    if not python.exists():
        pytest.skip(f"there is no {python}: `bash tools/setup_launch_env.sh` makes it, or set ASYNC_RLHF_LAUNCH_ENV")
    return python


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    if not can_be_had():
        pytest.skip("Slurm is not installed, and it takes root and apt-get to install it")
    # Not below pytest's own directory: the names of Unix sockets may not be long.
    parent = Path(tempfile.mkdtemp(prefix="slurm-"))
    directory = parent / "testbed"
    try:
        started = subprocess.run([TESTBED, "start", directory], capture_output=True, text=True, timeout=280)
        assert started.returncode == 0, started.stdout + started.stderr
        export = started.stdout.splitlines()[-1]
        # What an outer Slurm job left in the environment would become part of each job here.
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))}
        environment["SLURM_CONF"] = export.removeprefix("export SLURM_CONF=")
        yield Slurm(parent, environment)
    finally:
        subprocess.run([TESTBED, "stop", directory], check=True, timeout=60)
        shutil.rmtree(parent)
