"""On which cores those processes run that have none of their own: API servers, the controller, and its reward workers.

While learner and generators both compute the kernel runs them on either's cores, and a run is as fast as its slower side.
So where one side is hardly ever idle, and the other clearly waits for it, they are bound to the other's cores, until that is
no longer so. Sides that are as good as balanced are left alone: which one waits changes from minute to minute there.

    idle seconds of both sides' cores, processor seconds of these processes ──> the side with room ──> all their threads

CPUs only: beside a GPU the cores near it are many, and mostly idle.
"""

import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from statistics import fmean

import psutil

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.launch.process import Process

_WINDOW_S = 20.0  # that is looked back at: a step or some, for what a moment shows says little
_HARDLY_IDLE = 0.1  # of a window: a side that waits for the other is idle for longer
_ROOM = (
    0.15  # of a window: the side that takes them has to stay idle for as long; balanced sides did for just below that
)


class FloatingProcesses:
    """Of one run, on this machine."""

    def __init__(self, config: RunConfig) -> None:
        launch = config.launch
        self._acts = config.run.device == "cpu" and launch.pin_cores and launch.cores == "split"
        self._all = frozenset(os.sched_getaffinity(0))
        self._side: int | None = None
        self._looked: float | None = None
        self._idle: list[float] = []
        self._used = 0.0

    def place(self, processes: Sequence[Process]) -> None:
        """Decide anew, if there is a window to look back at; call it often.

        Args:
            processes: of the run; the controller is the last.
        """
        now = time.monotonic()
        if not self._acts or (self._looked is not None and now - self._looked < _WINDOW_S):
            return
        here = [process for process in processes if process.spec.node == 0]
        learners = frozenset(core for process in here for core in process.spec.cores)
        sides = (learners, self._all - learners)
        if not all(sides):
            return
        floating = list(_floating(here))
        idle, used = [_idle_s(side) for side in sides], sum(map(_used_s, floating))
        if self._looked is not None:
            spans = [after - before for before, after in zip(self._idle, idle, strict=True)]
            needed = [(used - self._used) / len(side) for side in sides]
            before, self._side = self._side, side_with_room(spans, needed, now - self._looked, self._side)
            if self._side is not None or before is not None:
                _bind(floating, self._all if self._side is None else sides[self._side])
        self._looked, self._idle, self._used = now, idle, used


def side_with_room(
    idle_s: Sequence[float], needed_s: Sequence[float], window_s: float, bound: int | None
) -> int | None:
    """Which of two sides can take the floating processes and still waits for the other, which hardly ever is idle.

    Args:
        idle_s: of a side's cores, on average, in the window.
        needed_s: what the processes would take of each of its cores.
        bound: the side that has had them, and whose idle time is without what they took; None: any core may have had them.
    """
    for side, other in ((0, 1), (1, 0)):
        room = idle_s[side] - (0.0 if side == bound else needed_s[side])
        if idle_s[other] <= _HARDLY_IDLE * window_s and room >= _ROOM * window_s:
            return side
    return None


def _floating(processes: Sequence[Process]) -> Iterator[psutil.Process]:
    """Of a server its API server alone: engine and workers are bound to cores. Of the controller its reward workers too."""
    for process in processes:
        if process.spec.cores or process.pid is None:
            continue
        with contextlib.suppress(psutil.Error):  # it has ended
            found = psutil.Process(process.pid)
            yield found
            if process is processes[-1]:
                yield from found.children(recursive=True)


def _idle_s(cores: Iterable[int]) -> float:
    """Since the machine was started, of one core on average; 0 where it does not say."""
    times = psutil.cpu_times(percpu=True)
    return fmean(times[core].idle + times[core].iowait if core < len(times) else 0.0 for core in cores)


def _used_s(process: psutil.Process) -> float:
    with contextlib.suppress(psutil.Error):
        times = process.cpu_times()
        return times.user + times.system
    return 0.0


def _bind(processes: Iterable[psutil.Process], cores: Iterable[int]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):  # it has ended
            for thread in process.threads():
                with contextlib.suppress(OSError):  # this thread has; the others are bound all the same
                    os.sched_setaffinity(thread.id, cores)
