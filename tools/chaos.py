"""Harms real runs in every way, and proves from what they leave that nothing was lost, trained twice, or late.

    python tools/chaos.py /tmp/chaos --runs 40 --faults 5 --json docs/results/chaos.json

Every run is of a small fresh model on two CPU cores: one learner rank, two generators, a reward in worker processes, a
checkpoint every second step. Its faults are drawn from `--seed` and its number, so each can be made again (`--only`). A run
that ends before it is completed is resumed, as an operator would.

The ledger reads the run's files by itself (JSON, MessagePack), not with the code that wrote them:

- every optimizer step is there once; every group of prompts is trained once; no token is older than the bound;
- a run that goes on makes a step, or ends, within `--bound` seconds of a fault;
- a run that ends says why: by the name of the process, or of the file, that was harmed;
- a synchronous run has the metrics of an undisturbed one, bit for bit.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil

STEPS, PROMPTS, EVERY = 12, 4, 2
CONFIG = {
    "model": {"layers": 2, "hidden_size": 64, "ffn_size": 96, "heads": 2, "kv_heads": 1, "context_length": 96},
    "learner": {"learning_rate": 1.0e-3, "micro_batch_tokens": 256, "timeout_s": 40},
    "generator": {
        "replicas": 2, "max_new_tokens": 24, "max_concurrent": 32, "restarts": 50, "request_timeout_s": 20, "probe_timeout_s": 10,
    },
    "schedule": {"steps": STEPS, "prompts_per_step": PROMPTS, "record": True},
    "algorithm": {"type": "rloo", "samples_per_prompt": 4},
    "data": {"train_prompts": 64, "eval_prompts": 16},
    "weights": {"timeout_s": 15},
    "checkpoint": {"every_steps": EVERY, "keep_last": 3},
    "run": {"max_restarts": 50},
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
MEASURED = ("time", "tokens_per_s", "model_flops_utilisation")
DISK_MIB = 96
EXIT_BAD_INPUT = 2


class Violation(Exception):
    """A promise that was broken."""


class ChaosRun:
    """One run, from its start to its completion, whatever happens to it."""

    def __init__(self, directory: Path, schedule: str, *, disk: bool, bound_s: float) -> None:
        self.directory, self.schedule, self.bound_s = directory, schedule, bound_s
        self.run = directory / "run"
        self.ends: list[str] = []
        self.done: list[str] = []  # all that it was harmed by
        self.since: list[str] = []  # its last start
        self.slowest = 0.0
        directory.mkdir(parents=True)
        self.disk = directory / "disk" if disk else None
        if self.disk is not None:
            self.disk.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", self.disk], check=True)
            self.run = self.disk / "run"
        (directory / "reward.py").write_text(REWARD)
        reward = {"type": "function", "function": f"{directory}/reward.py:score", "workers": 2, "timeout_s": 15}
        tree = CONFIG | {"schedule": CONFIG["schedule"] | SCHEDULES[schedule], "reward": reward}
        tree["run"] = CONFIG["run"] | {"dir": str(self.run)}
        (directory / "config.yaml").write_text(json.dumps(tree))  # which is YAML
        self.process = self._start()

    def _start(self, *flags: str) -> subprocess.Popen:
        with (self.directory / "output").open("a") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "megatron_async_rlhf", "train", str(self.directory / "config.yaml"), *flags],
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def pid(self, name: str) -> int:
        pid = (
            self.process.pid
            if name == "supervisor"
            else json.loads((self.run / "logs/processes.json").read_text())[name]
        )
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

    def harm(self, fault: str, dice: random.Random) -> None:
        """If what it would harm is there."""
        with contextlib.suppress(
            psutil.NoSuchProcess, ProcessLookupError, IndexError, ValueError, KeyError, FileNotFoundError
        ):
            told = FAULTS[fault](self, dice)
            self.done.append(told)
            self.since.append(told)

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

    def _follow_advice(self) -> None:
        """Delete the checkpoints that it says are in the way."""
        error = (self.directory / "output").read_text().strip().splitlines()[-1]
        advice = re.search(r"; delete (.+) to go on from step \d+$", error)
        if advice is None:
            raise Violation(f"it cannot be resumed: {error}")
        for checkpoint in advice[1].split(" and "):
            shutil.rmtree(checkpoint)

    def _ended(self, code: int) -> None:
        """Its last words must fit what was done to it since it was started; of several faults any may have ended it."""
        if code == EXIT_BAD_INPUT:
            self._follow_advice()
            self.process = self._start("--resume")
            return
        summary = json.loads((self.run / "summary.json").read_text())
        status, error = summary["status"], str(summary.get("error"))
        self.ends.append(f"{', '.join(self.since) or 'nothing'}: {status}, {error}")
        words = {harmed: next(words for mark, words in LAST_WORDS.items() if mark in harmed) for harmed in self.since}
        if not any(status == wanted and part in error for wanted, part in words.values()):
            raise Violation(f"after {self.since or 'nothing'} it says {status}, {error!r} (exit code {code})")
        self.since = []
        if self.disk is not None:
            (self.disk / "filler").unlink(missing_ok=True)
        self.process = self._start("--resume")

    def close(self) -> None:
        """End what is left; the files stay. Harmless a second time."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
        if self.disk is not None:
            kept = self.directory / "run"
            shutil.copytree(self.run, kept, dirs_exist_ok=True)
            subprocess.run(["umount", "-l", self.disk], check=False)
            self.run, self.disk = kept, None


# How a run may end that was harmed so, and what its error must name. A supervisor that is killed has no last words.
LAST_WORDS = {
    "SIGTERM": ("interrupted", ""), "supervisor": ("failed", ""), "disk": ("failed", "No space left"),
    "spawn_main": ("failed", "reward"), "controller": ("failed", "controller"), "learner": ("failed", "learner"),
    "generator": ("failed", "generator"), "checkpoint": ("failed", "learner"),
}  # fmt: skip


def kill(name: str, number: signal.Signals) -> Callable[[ChaosRun, random.Random], str]:
    def harm(run: ChaosRun, dice: random.Random) -> str:
        os.kill(run.pid(name), number)
        return f"{name} {number.name}"

    return harm


def kill_below(name: str, mark: str, number: signal.Signals) -> Callable[[ChaosRun, random.Random], str]:
    def harm(run: ChaosRun, dice: random.Random) -> str:
        os.kill(dice.choice(run.children(name, mark)), number)
        return f"{name}'s {mark} {number.name}"

    return harm


def damage_checkpoint(run: ChaosRun, dice: random.Random) -> str:
    """A byte of the newest one is flipped, or the end of a file cut off; then the learner needs it. There is an older one."""
    *_, _, newest = sorted((run.run / "checkpoints").glob("step_??????"))
    path = dice.choice([path for path in sorted(newest.rglob("*")) if path.is_file() and path.stat().st_size])
    place = dice.randrange(path.stat().st_size)
    if dice.random() < 0.5:
        os.truncate(path, place)
    else:
        with path.open("r+b") as file:
            file.seek(place)
            byte = file.read(1)[0] ^ (1 << dice.randrange(8))
            file.seek(place)
            file.write(bytes([byte]))
    os.kill(run.pid("learner.0"), signal.SIGKILL)
    return f"checkpoint {path.relative_to(run.run)}"


def fill_disk(run: ChaosRun, dice: random.Random) -> str:
    assert run.disk is not None
    with (run.disk / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(2**16))
        except OSError:
            return "disk full"


FAULTS: dict[str, Callable[[ChaosRun, random.Random], str]] = {
    "learner killed": kill("learner.0", signal.SIGKILL),
    "learner stopped": kill("learner.0", signal.SIGSTOP),
    "generator killed": kill("generator.0", signal.SIGKILL),
    "generator stopped": kill("generator.1", signal.SIGSTOP),
    "engine killed": kill_below("generator.0", "EngineCore", signal.SIGKILL),
    "engine stopped": kill_below("generator.1", "EngineCore", signal.SIGSTOP),
    "reward worker killed": kill_below("controller", "spawn_main", signal.SIGKILL),
    "reward worker stopped": kill_below("controller", "spawn_main", signal.SIGSTOP),
    "controller killed": kill("controller", signal.SIGKILL),
    "supervisor killed": kill("supervisor", signal.SIGKILL),
    "interrupted": lambda run, dice: (os.kill(run.process.pid, signal.SIGTERM), "SIGTERM")[1],
    "checkpoint damaged": damage_checkpoint,
    "disk full": fill_disk,
}


def check(run: ChaosRun, reference: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """What the run left; its metrics without times.

    Raises:
        Violation: a promise was broken.
    """
    summary = json.loads((run.run / "summary.json").read_text())
    if summary["status"] != "completed":
        raise Violation(f"status {summary['status']}: {summary['error']}")
    lines = [json.loads(line) for line in (run.run / "metrics.jsonl").read_text().splitlines()]
    if [line["step"] for line in lines] != list(range(1, STEPS + 1)):
        raise Violation(f"steps {[line['step'] for line in lines]}")
    trained: Counter[int] = Counter()
    for path in sorted((run.run / "rollouts").glob("step_*.msgpack")):
        record = msgspec.msgpack.decode(path.read_bytes())
        for group in record["groups"]:
            trained[group["index"]] += 1
            oldest = min((version for versions in group["versions"] for version in versions), default=None)
            if oldest is not None and record["command"]["version"] - oldest > BOUNDS[run.schedule]:
                raise Violation(f"group {group['index']} has tokens of version {oldest} in {path.name}")
    if trained != Counter(range(STEPS * PROMPTS)):
        twice = [index for index, times in trained.items() if times > 1]
        raise Violation(f"trained twice: {twice}, never: {sorted(set(range(STEPS * PROMPTS)) - set(trained))}")
    metrics = [{key: value for key, value in line.items() if not key.startswith(MEASURED)} for line in lines]
    if reference is not None and run.schedule == "sync" and metrics != reference:
        differs = next(n for n, (ours, theirs) in enumerate(zip(metrics, reference, strict=True), 1) if ours != theirs)
        raise Violation(f"step {differs} is not that of an undisturbed run")
    return metrics


def disturb(run: ChaosRun, faults: list[str], dice: random.Random) -> None:
    """Each after another step, as far as there are any."""
    for place, fault in enumerate(faults):
        step = 1 + place * (STEPS - 3) // len(faults)
        run.wait(lambda step=step: run.steps() >= step)
        if run.process.poll() == 0:
            break
        time.sleep(dice.random() * 1.5)
        run.harm(fault, dice)
    run.wait(lambda: run.process.poll() == 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, help="folder for the runs; those that went well are deleted")
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--faults", type=int, default=5, help="of each run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the run with this number")
    parser.add_argument("--bound", type=float, default=150.0, help="most seconds without a step or an end")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args()
    reference = undisturbed(options)
    kinds = sorted(FAULTS)
    results, bad = [], 0
    for number in range(options.runs) if options.only is None else [options.only]:
        dice = random.Random(f"{options.seed}/{number}")
        schedule = dice.choice(sorted(SCHEDULES))
        faults = dice.sample(kinds, options.faults)
        result = one(options, number, schedule, faults, dice, reference)
        results.append(result)
        bad += result["violation"] is not None
        if options.json is not None:
            options.json.write_text(json.dumps({"seed": options.seed, "runs": results}, indent=1) + "\n")
    print(f"{sum(len(each['faults']) for each in results)} faults in {len(results)} runs, {bad} violations")
    return 1 if bad else 0


def undisturbed(options: argparse.Namespace) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as directory:
        run = ChaosRun(Path(directory) / "whole", "sync", disk=False, bound_s=options.bound)
        try:
            run.wait(lambda: run.process.poll() == 0)
            return check(run, None)
        finally:
            run.close()


def one(
    options: argparse.Namespace,
    number: int,
    schedule: str,
    faults: list[str],
    dice: random.Random,
    reference: list[dict[str, Any]],
) -> dict[str, Any]:
    began, violation, reward = time.monotonic(), None, None
    run = ChaosRun(options.out / f"run_{number}", schedule, disk="disk full" in faults, bound_s=options.bound)
    try:
        disturb(run, faults, dice)
        run.close()
        reward = sum(line["reward"] for line in check(run, reference)[-4:]) / 4
    except Violation as error:
        violation = str(error)
    finally:
        run.close()
    seconds = time.monotonic() - began
    print(
        f"run {number}, {schedule}: {', '.join(run.done)}; {seconds:.0f} s; {violation or 'all promises kept'}",
        flush=True,
    )
    if violation is None:
        shutil.rmtree(run.directory)
    return {
        "number": number, "schedule": schedule, "faults": run.done, "ends": run.ends, "seconds": round(seconds, 1),
        "slowest": round(run.slowest, 1), "reward": reward, "violation": violation,
    }  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
