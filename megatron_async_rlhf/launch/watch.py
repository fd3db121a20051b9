"""`async-rlhf watch`: the live view of a run, from another terminal, or from another machine that sees its directory."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Annotated, Any

import typer

from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.launch.display import Display
from megatron_async_rlhf.launch.held_memory import HeldMemory
from megatron_async_rlhf.launch.owner import owner_places
from megatron_async_rlhf.telemetry.files import EVENTS, check_is_run
from megatron_async_rlhf.telemetry.summary import is_unfinished, read_summary

_POLL_S = 0.25
_SILENT_S = 30.0  # without a touch of its file, a run is dead; a shared file system may show one late


def watch(
    run: Annotated[
        Path, typer.Argument(help="Directory of a run that is still running; one that has ended is told at once.")
    ],
) -> None:
    """Follow a run: phase, time left, reward, staleness, what each side is doing. Interrupting this leaves the run alone.

    Example: async-rlhf watch runs/quickstart
    """
    check_is_run(run)
    path = run / EVENTS
    if not path.is_file():
        raise ConfigError(f"{path}: is not there; the run has not begun, or was written by a version without it")
    closed: dict[str, Any] = {}
    display = None
    try:
        with path.open(encoding="utf-8") as file:
            for event in _followed(file, Heartbeat(owner_places(run))):
                happened = time.monotonic() - max(0.0, time.time() - event["time"])
                display = display or Display(memory=HeldMemory(run), began=happened)
                display.show(event, happened)
                closed = event if event["event"] == "closed" else {}
        display = display or Display()
    except KeyboardInterrupt:
        display = display or Display()
        display.finished("still running", None, [], run)
        return
    status, error = _how_it_ended(run, closed)
    display.finished(status, error, [], run)


def _how_it_ended(run: Path, closed: dict[str, Any]) -> tuple[str, str | None]:
    """By the last word of who supervised it, who knows more than the controller that `closed`."""
    summary = read_summary(run)
    if summary and not is_unfinished(summary):
        return summary["status"], summary["error"]
    if closed:
        return closed["status"], closed["error"]
    return (
        "interrupted",
        "the run has ended without saying how: it was killed; --resume continues from its last checkpoint",
    )


class Heartbeat:
    """Whether a run is still running: who supervises it touches a file every second, and removes it in the end."""

    def __init__(self, places: Sequence[Path]) -> None:
        """
        Args:
            places: where that file may be.
        """
        self._places = places
        self._touched: float | None = None
        self._seen = time.monotonic()

    def __call__(self) -> bool:
        times = []
        for place in self._places:
            with contextlib.suppress(OSError):
                times.append(place.stat().st_mtime)
        if not times:
            return False
        touched = max(times)
        if touched != self._touched:
            self._touched, self._seen = touched, time.monotonic()
        return time.monotonic() - self._seen < _SILENT_S


def _followed(file: IO[str], goes_on: Callable[[], bool]) -> Iterator[dict[str, Any]]:
    """The events of the last start of a run, and then new ones, until it has ended."""
    lines = file.readlines()
    starts = [place for place, line in enumerate(lines) if _event(line).get("name") == "start"]
    lines, partial = lines[starts[-1] if starts else 0 :], ""
    while True:
        was_alive = goes_on()  # asked first: what a run writes before it ends is read below
        for line in lines:
            event = _event(partial + line)
            partial = "" if line.endswith("\n") else partial + line
            if event and not partial:
                yield event
        if not was_alive and not lines:
            return
        time.sleep(_POLL_S if was_alive else 0)
        lines = file.readlines()


def _event(line: str) -> dict[str, Any]:
    """Empty for what is none, such as half a line."""
    try:
        event = json.loads(line)
    except ValueError:
        return {}
    return event if isinstance(event, dict) and "event" in event and "time" in event else {}
