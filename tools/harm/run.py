"""One run, from its start to its completion, whatever happens to it: it is resumed whenever it ends before."""

import contextlib
import ctypes
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from harm.network import TwoMachines

STEPS, PROMPTS, EVERY = 20, 4, 2
CONFIG = {
    "model": {"layers": 2, "hidden_size": 64, "ffn_size": 96, "heads": 2, "kv_heads": 1, "context_length": 96},
    "learner": {"learning_rate": 1.0e-3, "micro_batch_tokens": 256, "timeout_s": 40},
    "generator": {
        "replicas": 2, "max_new_tokens": 24, "max_concurrent": 32, "restarts": 50, "request_timeout_s": 20, "probe_timeout_s": 10,
    },
    "schedule": {"prompts_per_step": PROMPTS, "record": True},
    "algorithm": {"type": "rloo", "samples_per_prompt": 4},
    "data": {"train_prompts": 64, "eval_prompts": 16},
    "weights": {"timeout_s": 15},
    "checkpoint": {"every_steps": EVERY, "keep_last": 3},
    "run": {"max_restarts": 50},
    "launch": {"node_timeout_s": 10, "join_timeout_s": 90},
}  # fmt: skip
SCHEDULES: dict[str, dict[str, Any]] = {
    "sync": {"mode": "sync"},
    "one step": {"mode": "async", "max_staleness": 1},
    "streaming": {"mode": "async", "max_staleness": 2, "generation": "streaming", "in_flight_updates": "recompute"},
    "resubmitting": {"mode": "async", "max_staleness": 2, "generation": "streaming", "in_flight_updates": "resubmit"},
}
BOUNDS = {"sync": 0, "one step": 1, "streaming": 2, "resubmitting": 2}
REWARD = '''
import time


def score(prompt: str, completions: list[str]) -> list[float]:
    """The share of different characters; deterministic, and not the same for all. Slow, so that a step takes a second."""
    time.sleep(0.4)
    return [len(set(text)) / max(1, len(text)) for text in completions]
'''
DISK_MIB = 96
EXIT_BAD_INPUT = 2
_PATIENCE_S = 5.0
_GONE_S = 30.0  # after a run
_PR_SET_CHILD_SUBREAPER = 36
# How a run may end that was harmed so, and what its error must name; nothing else may end one. A supervisor that is killed
# has no last words.
LAST_WORDS = {
    "SIGTERM": ("interrupted", ""), "supervisor": ("failed", ""), "disk full": ("failed", "No space left"),
    "spawn_main": ("failed", "reward"), "controller": ("failed", "controller"), "learner": ("failed", "learner"),
    "generator": ("failed", "generator"), "checkpoint": ("failed", "learner"), "wire cut": ("failed", "m1"),
}  # fmt: skip


def configuration(directory: Path, run_dir: Path) -> dict[str, Any]:
    """Of a small run, to be changed; its reward is written into the directory."""
    (directory / "reward.py").write_text(REWARD)
    tree: dict[str, Any] = json.loads(json.dumps(CONFIG))
    tree["run"]["dir"] = str(run_dir)
    tree["reward"] = {"type": "function", "function": f"{directory}/reward.py:score", "workers": 2, "timeout_s": 15}
    return tree


def adopt_orphans() -> None:
    """Processes whose parents have died become children of this one."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _below_this_one() -> set[psutil.Process]:
    """Processes that have not ended."""
    found = set()
    for each in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it ends meanwhile
            if each.status() != psutil.STATUS_ZOMBIE:
                found.add(each)
    return found


class Violation(Exception):
    """A promise that was broken."""


@dataclass(frozen=True)
class Setting:
    """What a run is, and is run on.

    Attributes:
        ranks: of the learner, tensor-parallel.
        machines: 2: learner and one generator on the first, the other generator on the second.
        disk: a small one of its own.
        steps: of the run.
        clock: its processes see a time of day that can be set.
    """

    schedule: str
    ranks: int = 1
    machines: int = 1
    disk: bool = False
    steps: int = STEPS
    clock: bool = False

    def __str__(self) -> str:
        parts = [self.schedule, "2 ranks" if self.ranks == 2 else "", "2 machines" if self.machines == 2 else ""]
        return ", ".join(part for part in parts if part)


class ChaosRun:
    """See above.

    Attributes:
        done: all that it was harmed by.
        since: what of that came after its last start.
        slowest: the longest time without a step, in seconds.
    """

    def __init__(self, directory: Path, setting: Setting, *, bound_s: float) -> None:
        self.directory, self.setting, self.bound_s = directory, setting, bound_s
        self.run = directory / "run"
        self.ends: list[str] = []
        self.done: list[str] = []
        self.since: list[str] = []
        self.slowest = 0.0
        directory.mkdir(parents=True)
        self.network = TwoMachines(f"chaos{os.getpid()}") if setting.machines == 2 else None
        self.disk = directory / "disk" if setting.disk else None
        if self.disk is not None:
            self.disk.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", self.disk], check=True)
            self.run = self.disk / "run"
        if setting.clock:
            source = Path(__file__).with_name("clock.c")
            subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", directory / "clock.so", source], check=True)
            (directory / "clock").write_bytes(bytes(8))
        self._others = _below_this_one()
        self._write_config()
        self._start()

    def _write_config(self) -> None:
        tree = configuration(self.directory, self.run)
        tree["schedule"] |= SCHEDULES[self.setting.schedule] | {"steps": self.setting.steps}
        tree["learner"] |= {"ranks": self.setting.ranks, "tensor_parallel": self.setting.ranks}
        tree["launch"]["nodes"] = self.setting.machines
        (self.directory / "config.yaml").write_text(json.dumps(tree))  # which is YAML

    def command(self, *flags: str) -> list[str]:
        config = str(self.directory / "config.yaml")
        return [sys.executable, "-m", "megatron_async_rlhf", "train", config, *flags]

    def _start(self, *flags: str) -> None:
        environment = dict(os.environ)
        if self.setting.clock:
            environment |= {
                "LD_PRELOAD": str(self.directory / "clock.so"),
                "CHAOS_CLOCK": str(self.directory / "clock"),
            }
        self._starts = []
        for machine in range(self.setting.machines):
            where = [] if self.network is None else self.network.command(machine)
            rank = [] if self.network is None else ["--node-rank", str(machine)]
            with (self.directory / ("output" if machine == 0 else f"output.{machine}")).open("a") as output:
                command = [*where, *self.command(*flags, *rank)]
                self._starts.append(
                    subprocess.Popen(
                        command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=environment
                    )
                )
        self.process = self._starts[0]

    def set_clock(self, seconds: int) -> None:
        """By so much another time than it is, for all processes of the run."""
        with (self.directory / "clock").open("r+b") as file:  # which they have mapped
            file.write(struct.pack("<q", seconds))

    def pid(self, name: str) -> int:
        if name == "supervisor":
            return self.process.pid
        pid = json.loads((self.run / "logs/processes.json").read_text())[name]
        if pid is None:
            raise psutil.NoSuchProcess(0)
        return pid

    def children(self, name: str, mark: str) -> list[int]:
        """Processes below this one whose command line has the mark."""
        below = psutil.Process(self.pid(name)).children(recursive=True)
        return [each.pid for each in below if mark in " ".join(each.cmdline())]

    def steps(self) -> int:
        path = self.run / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def harm(self, fault: Callable[["ChaosRun", random.Random], str], dice: random.Random) -> None:
        """As soon as what it would harm is there; not at all if it is not soon."""
        missing = (psutil.NoSuchProcess, ProcessLookupError, IndexError, ValueError, KeyError, FileNotFoundError)
        deadline = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(*missing):
                told = fault(self, dice)
                self.done.append(told)
                self.since.append(told)
                return
            time.sleep(0.2)

    def wait(self, until: Callable[[], bool]) -> None:
        """Until a condition holds; resumes the run whenever it ends before it is completed.

        Raises:
            Violation: it neither made a step nor ended for too long, or ended for another reason than what was harmed.
        """
        since, seen = time.monotonic(), self.steps()
        while not until():
            code = self.process.poll()
            if code == 0:
                return
            if code is not None:
                self._ended(code)
                since = time.monotonic()
            if self.steps() != seen:
                seen, since = self.steps(), time.monotonic()
            self.slowest = max(self.slowest, time.monotonic() - since)
            if time.monotonic() - since > self.bound_s:
                raise Violation(f"neither a step nor an end for {self.bound_s:g} s after {self.since}")
            time.sleep(0.1)

    def _ended(self, code: int) -> None:
        """Its last words must fit what was done to it since it was started; of several faults any may have ended it."""
        self._wait_for_machines()
        if code == EXIT_BAD_INPUT:
            self._follow_advice()
            self._start("--resume")
            return
        status, error = self._last_words()
        self.ends.append(f"{', '.join(self.since) or 'nothing'}: {status}, {error}")
        words = [words for harmed in self.since for mark, words in LAST_WORDS.items() if mark in harmed]
        if not any(status == wanted and part in error for wanted, part in words):
            raise Violation(f"after {self.since or 'nothing'} it says {status}, {error!r} (exit code {code})")
        self.since = []
        if self.disk is not None:
            (self.disk / "filler").unlink(missing_ok=True)
        self._start("--resume")

    def _last_words(self) -> tuple[str, str]:
        """Status and error. A controller whose supervisor was killed says them a moment later."""
        deadline = time.monotonic() + 30
        while True:
            summary = json.loads((self.run / "summary.json").read_text())
            status, error = summary["status"], str(summary.get("error"))
            if "it is still running" not in error or time.monotonic() > deadline:
                return status, error
            time.sleep(0.2)

    def _wait_for_machines(self) -> None:
        """All must end with the first one."""
        for other in self._starts[1:]:
            try:
                other.wait(60)
            except subprocess.TimeoutExpired:
                raise Violation("the second machine continues 60 s after the first has ended") from None

    def _follow_advice(self) -> None:
        """Delete the checkpoints that it says are in the way."""
        error = (self.directory / "output").read_text().strip().splitlines()[-1]
        advice = re.search(r"; delete (.+) to continue from step \d+$", error)
        if advice is None:
            raise Violation(f"it cannot be resumed: {error}")
        for checkpoint in advice[1].split(" and "):
            shutil.rmtree(checkpoint)

    def kill_left(self) -> list[str]:
        """Processes that are still there a while after the end, whatever has become of who started them."""
        deadline = time.monotonic() + _GONE_S
        while (left := _below_this_one() - self._others) and time.monotonic() < deadline:
            time.sleep(0.2)
        for each in left:
            each.kill()
        return list(map(str, left))

    def close(self) -> None:
        """End what is left; the files stay. Harmless a second time."""
        for start in self._starts:
            if start.poll() is not None:
                continue
            for number in (signal.SIGTERM, signal.SIGINT):
                os.killpg(start.pid, number)
                time.sleep(0.2)
            try:
                start.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(start.pid, signal.SIGKILL)
        if self.network is not None:
            self.network.close()
            self.network = None
        if self.disk is not None:
            kept = self.directory / "run"
            shutil.copytree(self.run, kept, dirs_exist_ok=True)
            subprocess.run(["umount", "-l", self.disk], check=False)
            self.run, self.disk = kept, None
