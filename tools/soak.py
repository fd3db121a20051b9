"""Lets a run continue for an hour or longer, with all that a long one meets, and measures whether anything grows.

    python tools/soak.py /tmp/soak --json docs/results/soak.json

A small fresh model in streaming mode on CPU cores: pushes at every step, a held-out evaluation every 20, a checkpoint every
10, and every few minutes one generator is killed and started again. Every 10 seconds, of each process: resident memory, file
descriptors, sockets, threads; of the machine: what the run has in /dev/shm and in the directory for temporary files.

All of it is in `measured.jsonl`. After a warm-up (`--warm-up`) no process's memory may grow by more than `--limit` per cent an
hour, by a line fitted to it, and no count may be higher in the second half than in the first, by their medians: while a
generator is started again there is more of some. Step times are compared so, too. A process that was started again is another
process, and counts if it lives for half of the time or more.

oneDNN's cache of kernels, one for each shape of a batch, is kept small: else it takes hours until an engine has met its
shapes, 0.45 MB each, and all the while it grows for that reason.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
from harm.run import SCHEDULES, configuration

_EVERY_S = 10.0
_KILL_EVERY_S = 240.0
_MEMORY = "memory, % an hour"
_COUNTS = ("descriptors", "sockets", "threads")


class Soak:
    """The run, and what was measured of it."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        self.run, self.scratch = directory / "run", directory / "tmp"
        self.scratch.mkdir()
        tree = configuration(directory, self.run)
        tree["reward"]["timeout_s"] = 30
        tree["schedule"] = SCHEDULES["streaming"] | {"steps": 1_000_000, "prompts_per_step": 4, "eval_every": 20}
        tree["checkpoint"] = {"every_steps": 10, "keep_last": 2}
        tree["generator"]["restarts"] = 1000
        tree["launch"]["environment"] = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}
        (directory / "config.yaml").write_text(json.dumps(tree))  # which is YAML
        command = [sys.executable, "-m", "megatron_async_rlhf", "train", str(directory / "config.yaml")]
        with (directory / "output").open("w") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | {"TMPDIR": str(self.scratch)}
            )
        self.processes: dict[str, list[dict[str, float]]] = defaultdict(list)  # by name and id
        self.machine: list[dict[str, float]] = []
        self.series = directory / "measured.jsonl"
        self.kills = 0

    def measure(self, minute: float) -> None:
        shared, latest = set(), {}
        for name, root in self._roots().items():
            for process in (root, *root.children(recursive=True)):
                try:
                    figures = {
                        "minute": minute,
                        "memory_mb": process.memory_info().rss / 1e6,
                        "descriptors": process.num_fds(),
                        "sockets": len(process.net_connections()),
                        "threads": process.num_threads(),
                    }
                    shared |= {each.path for each in process.memory_maps() if each.path.startswith("/dev/shm/")}
                    title = name if process is root else f"{name} {process.name()}"
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
                latest[f"{title} {process.pid}"] = figures
        for title, figures in latest.items():
            self.processes[title].append(figures)
        temporary = sum(1 for _ in self.scratch.rglob("*"))
        self.machine.append({"minute": minute, "shared_memory_files": len(shared), "temporary_files": temporary})
        with self.series.open("a") as file:
            file.write(json.dumps(latest | {"machine": self.machine[-1]}) + "\n")

    def kill_generator(self) -> None:
        """Always the same: the other one shows whether generators grow."""
        with contextlib.suppress(KeyError):  # it is being started again
            self._roots()["generator.0"].kill()
            self.kills += 1

    def end(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(180)

    def step_times(self) -> list[tuple[float, float]]:
        """When each step ended, in minutes since the first, and how long it took, in seconds."""
        events = (json.loads(line) for line in (self.run / "logs/events.jsonl").read_text().splitlines())
        ends = [event["time"] for event in events if event["event"] == "step"]
        return [((end - ends[0]) / 60, end - before) for before, end in zip(ends, ends[1:], strict=False)]

    def _roots(self) -> dict[str, psutil.Process]:
        pids = json.loads((self.run / "logs/processes.json").read_text()) | {"supervisor": self.process.pid}
        pids.pop("machines", None)
        roots = {}
        for name, pid in pids.items():
            try:
                roots[name] = psutil.Process(pid)
            except psutil.NoSuchProcess:
                continue  # it is being started again
        if "supervisor" in roots:
            roots["supervisor"].children = lambda recursive=False: []  # they have names of their own
        return roots


def percent_an_hour(points: list[dict[str, float]], key: str) -> float:
    """Growth, of the mean."""
    minutes, values = np.array([point["minute"] for point in points]), np.array([point[key] for point in points])
    return 100.0 * 60.0 * float(np.polyfit(minutes, values, 1)[0]) / float(values.mean())


def medians(points: list[tuple[float, float]]) -> list[float]:
    """Of the first and of the second half of the time. Each point is a minute and a value."""
    middle = (points[0][0] + points[-1][0]) / 2
    return [median(value for minute, value in points if (minute < middle) is first) for first in (True, False)]


def rise(points: list[dict[str, float]], key: str) -> float:
    """From the first half to the second."""
    first, second = medians([(point["minute"], point[key]) for point in points])
    return second - first


def verdict(soak: Soak, warm_up: float, minutes: float) -> dict[str, Any]:
    """Of everything that lived for half of the time after the warm-up."""
    processes: dict[str, dict[str, float]] = {}
    for name, points in soak.processes.items():
        after = [point for point in points if point["minute"] >= warm_up]
        if len(after) > 2 and after[-1]["minute"] - after[0]["minute"] >= (minutes - warm_up) / 2:
            processes[name] = {
                "last_memory_mb": round(after[-1]["memory_mb"], 1),
                _MEMORY: round(percent_an_hour(after, "memory_mb"), 3),
                **{f"more {key}": rise(after, key) for key in _COUNTS},
            }
    after = [point for point in soak.machine if point["minute"] >= warm_up]
    machine = {f"more {key}": rise(after, key) for key in ("shared_memory_files", "temporary_files")}
    halves = medians([step for step in soak.step_times() if step[0] >= warm_up])
    return {
        "minutes": minutes, "warm_up_minutes": warm_up, "steps": len(soak.step_times()), "generators_killed": soak.kills,
        "growth": processes | {"machine": machine},
        "median_step_s": {"first half": round(halves[0], 3), "second half": round(halves[1], 3)},
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, help="folder for the run; it must not exist yet")
    parser.add_argument("--minutes", type=float, default=105.0)
    parser.add_argument("--warm-up", type=float, default=45.0, help="minutes that do not count")
    parser.add_argument("--limit", type=float, default=1.0, help="most growth of memory, in per cent an hour")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"{options.out} exists already: name another folder, or remove it")
    if options.minutes < options.warm_up + 1:
        parser.error("--minutes must be at least a minute more than --warm-up: nothing else is measured")
    soak = Soak(options.out)
    while soak.process.poll() is None and not (soak.run / "metrics.jsonl").exists():
        time.sleep(1)
    began = time.monotonic()
    next_kill = began + _KILL_EVERY_S
    while soak.process.poll() is None and time.monotonic() - began < 60 * options.minutes:
        soak.measure((time.monotonic() - began) / 60)
        if time.monotonic() > next_kill:
            soak.kill_generator()
            next_kill += _KILL_EVERY_S
        time.sleep(_EVERY_S)
    if soak.process.poll() is not None:
        print(f"the run has ended by itself with {soak.process.returncode}: see {options.out / 'output'}")
        return 1
    code = soak.end()
    result = verdict(soak, options.warm_up, options.minutes)
    grows = {
        f"{name}: {key} {value:+g}"
        for name, figures in result["growth"].items()
        for key, value in figures.items()
        if key != "last_memory_mb" and value > (options.limit if key == _MEMORY else 0)
    }
    print(json.dumps(result, indent=1))
    print("\n".join(sorted(grows)) or f"no memory grows by more than {options.limit:g} % an hour, and no count at all")
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if grows or code != 130 else 0


if __name__ == "__main__":
    raise SystemExit(main())
