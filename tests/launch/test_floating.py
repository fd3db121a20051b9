"""Where API servers, controller and reward workers run."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from small_config import small_config

from megatron_async_rlhf.launch import floating
from megatron_async_rlhf.launch.floating import FloatingProcesses, side_with_room

LEARNER, GENERATORS = 0, 1
# Two threads, and a child that sleeps.
FAMILY = """
import subprocess, threading, time
threading.Thread(target=time.sleep, args=[600], daemon=True).start()
print(subprocess.Popen(["sleep", "600"]).pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize(
    ("idle", "needed", "bound", "side"),
    [
        ((4.0, 0.2), 0.6, None, LEARNER),
        ((0.2, 4.0), 0.6, None, GENERATORS),
        ((1.9, 0.2), 0.6, None, None),  # with them the learner would hardly wait any more
        ((1.9, 0.2), 0.6, LEARNER, LEARNER),  # and does, as this window shows
        ((1.1, 0.0), 0.0, None, None),  # as good as balanced
        ((0.1, 0.2), 0.6, LEARNER, None),
        ((0.1, 4.0), 0.6, LEARNER, GENERATORS),
        ((4.0, 3.0), 0.6, None, None),  # in turn, as synchronously: some core is always idle
        ((4.0, 3.0), 0.6, LEARNER, None),
        ((0.0, 0.0), 0.0, None, None),
    ],
)
def test_the_side_that_waits_takes_them(idle, needed, bound, side):
    assert side_with_room(idle, (needed, needed), 10.0, bound) == side


@pytest.fixture
def family() -> Iterator[tuple[subprocess.Popen, int]]:
    with subprocess.Popen([sys.executable, "-c", FAMILY], stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        yield parent, child
        os.kill(child, 9)
        parent.kill()


second_family = family


def process(pid: int, cores: list[int], node: int = 0) -> SimpleNamespace:
    return SimpleNamespace(pid=pid, spec=SimpleNamespace(cores=cores, node=node))


def cores_of(pid: int) -> set[frozenset[int]]:
    """Of all its threads."""
    return {frozenset(os.sched_getaffinity(thread.id)) for thread in psutil.Process(pid).threads()}


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_all_their_threads_are_bound_and_freed(family, second_family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (server, engine), (controller, worker) = family, second_family
    everywhere = frozenset(os.sched_getaffinity(0))
    learner, others = frozenset([min(everywhere)]), everywhere - {min(everywhere)}
    idle = dict.fromkeys((learner, others), 0.0)
    monkeypatch.setattr(floating, "_WINDOW_S", 0.0)
    monkeypatch.setattr(floating, "_idle_s", idle.__getitem__)
    # A rank of the learner, of which only the cores count; a generator on another machine, whose process is none here.
    processes = [process(2**22 + 1, [min(everywhere)]), process(os.getpid(), [], node=1)]
    processes += [process(server.pid, []), process(controller.pid, [])]
    moved = FloatingProcesses(small_config(tmp_path, 0))
    moved.place(processes)
    assert cores_of(server.pid) == {everywhere}

    def after(learner_idle: float, others_idle: float) -> list[set[frozenset[int]]]:
        idle[learner] += learner_idle
        idle[others] += others_idle
        moved.place(processes)
        assert cores_of(engine) == cores_of(os.getpid()) == {everywhere}
        return [cores_of(pid) for pid in (server.pid, controller.pid, worker)]

    assert after(0.0, 5.0) == [{others}] * 3
    assert after(5.0, 0.0) == [{learner}] * 3
    assert after(5.0, 5.0) == [{everywhere}] * 3


@pytest.mark.parametrize("keys", [{"pin_cores": False}, {"cores": "shared"}])
def test_where_sides_have_no_cores_of_their_own_nothing_is_bound(keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(floating, "_floating", lambda processes: pytest.fail("looked for some"))
    config = small_config(tmp_path, 0, {"launch": keys, "schedule": {"mode": "sync"}})
    FloatingProcesses(config).place([process(os.getpid(), [0])])
