"""An event loop whose clock jumps: nothing ever sleeps, and a deadlock is found instead of waited in.

select(timeout) ──> nothing to run now ──> the clock is at the next timer
               └──> no timer either    ──> DeadlockError, naming what every task waits in
"""

import asyncio
import math
import selectors
from collections import Counter
from collections.abc import Coroutine
from typing import Any

from megatron_async_rlhf.errors import AsyncRLHFError, DeadlockError


class _NoSelector(selectors.SelectSelector):
    """Keeps asyncio's own bookkeeping of files, and hands every wait to the loop."""

    loop: "VirtualTimeLoop"

    def select(self, timeout: float | None = None) -> list:
        if timeout is None or timeout > 0:
            self.loop.jump(timeout)
        return []


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Seconds start at 0. Nothing outside the loop can wake it: no sockets, threads or child processes."""

    def __init__(self, patience_s: float = math.inf) -> None:
        """`patience_s`: without `progress` for so long, what is scheduled is taken for polling in vain."""
        selector = _NoSelector()
        selector.loop = self
        super().__init__(selector)
        self._now = self._progress = 0.0
        self._patience_s = patience_s
        self.set_exception_handler(_report)

    def time(self) -> float:
        return self._now

    def progress(self) -> None:
        """Something was achieved."""
        self._progress = self._now

    def jump(self, timeout: float | None) -> None:
        """To the next timer.

        Raises:
            DeadlockError: there is none, or too many came to nothing.
        """
        if timeout is None:
            raise DeadlockError(f"nothing will ever happen again after {self._now:g} s: {self._waits()}")
        self._now = max(self._now + timeout, math.nextafter(self._now, math.inf))
        if self._now > self._progress + self._patience_s:
            raise DeadlockError(f"nothing was achieved from {self._progress:g} to {self._now:g} s: {self._waits()}")

    def _waits(self) -> str:
        places = Counter(_place(task) for task in asyncio.all_tasks(self))
        return "; ".join(f"{count} x {place}" if count > 1 else place for place, count in sorted(places.items()))


def _report(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Errors nobody listens to any more: of simulated deaths there are many once a run has failed, and it tells the first."""
    if not isinstance(context.get("exception"), AsyncRLHFError):
        loop.default_exception_handler(context)


def virtual_loop() -> VirtualTimeLoop:
    """The one that whoever asks runs in."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    return loop


def run_in_virtual_time(main: Coroutine[Any, Any, Any], *, patience_s: float = math.inf) -> Any:
    """As `asyncio.run`."""
    with asyncio.Runner(loop_factory=lambda: VirtualTimeLoop(patience_s)) as runner:
        return runner.run(main)


def _place(task: asyncio.Task) -> str:
    """The task's function, and the innermost one of ours it waits in: `Controller.run waits in Signal.wait_until:16`."""
    inner: Any = task.get_coro()  # then whatever that awaits
    frames: list[tuple[str, int]] = []
    while inner is not None:
        frame = getattr(inner, "cr_frame", None) or getattr(inner, "ag_frame", None)
        if frame is not None and "asyncio" not in frame.f_code.co_filename:
            frames.append((inner.__qualname__, frame.f_lineno))
        inner = getattr(inner, "cr_await", None) or getattr(inner, "ag_await", None)
    if not frames:
        return task.get_name()
    (name, _), (innermost, line) = frames[0], frames[-1]
    return f"{name} waits in {innermost}:{line}"
