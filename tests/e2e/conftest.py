"""Real runs of `async-rlhf train` with real processes; each takes about half a minute."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CONFIG = Path(__file__).with_name("tiny.yaml")
TIMEOUT_S = 240


class Run:
    """One `async-rlhf train` in a directory of its own."""

    def __init__(self, directory: Path, *overrides: str, flags: tuple[str, ...] = ()) -> None:
        self.directory = directory
        settings = [f"run.dir={directory}", *overrides]
        command = [sys.executable, "-m", "megatron_async_rlhf", "train", str(CONFIG), *flags]
        for setting in settings:
            command += ["-s", setting]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # the tests may run under nohup
        )

    def wait(self) -> str:
        """Its output, once it has ended."""
        output, _ = self.process.communicate(timeout=TIMEOUT_S)
        return output

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while len(self.lines("metrics.jsonl")) < step:
            assert self.process.poll() is None, self.process.stdout.read()
            assert time.monotonic() < deadline, "no step within the time limit"
            time.sleep(0.1)

    def kill(self, name: str) -> None:
        os.kill(self.pid(name), signal.SIGKILL)

    def pid(self, name: str) -> int:
        return json.loads((self.directory / "logs/processes.json").read_text())[name]

    def wait_for_another(self, name: str, pid: int) -> None:
        """Until the process that had this id has been started again."""
        deadline = time.monotonic() + TIMEOUT_S
        while self.pid(name) == pid:
            assert self.process.poll() is None, self.process.stdout.read()
            assert time.monotonic() < deadline, f"{name} was not started again"
            time.sleep(0.05)

    def belongings(self, name: str) -> tuple[Path, set[Path]]:
        """Of a process while it runs: its temporary directory, and the shared memory that all it has started use."""
        pid = self.pid(name)
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        temporary = next(v.removeprefix(b"TMPDIR=").decode() for v in variables if v.startswith(b"TMPDIR="))
        shared = set()
        for path in Path("/proc").glob("[0-9]*/maps"):
            with contextlib.suppress(OSError):
                if os.getsid(int(path.parent.name)) == pid:
                    shared |= {Path(line.split()[5]) for line in path.read_text().splitlines() if " /dev/shm/" in line}
        return Path(temporary), shared

    def summary(self) -> dict:
        return json.loads((self.directory / "summary.json").read_text())

    def lines(self, file: str) -> list[dict]:
        path = self.directory / file
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def start(tmp_path: Path):
    """Starts runs and makes sure none outlives the test."""
    runs: list[Run] = []

    def start(*overrides: str, resume: Path | None = None) -> Run:
        """`resume`: the run directory to continue in."""
        if resume is not None:
            runs.append(Run(resume, *overrides, flags=("--resume",)))
        else:
            runs.append(Run(tmp_path / f"run{len(runs)}", *overrides))
        return runs[-1]

    yield start
    for run in runs:
        if run.process.poll() is None:
            run.process.send_signal(signal.SIGINT)
            run.process.send_signal(signal.SIGINT)
            run.process.wait(timeout=60)
