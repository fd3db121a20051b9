"""The controller's progress as one JSON object per line on a pipe: what a terminal, or a test, can follow live.

Whoever supervises the run keeps them in a file too, with the time, for those who look from elsewhere.
"""

import contextlib
import json
import sys
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from megatron_async_rlhf.clock import now

LAST_PHASE = "end"  # of a run: nothing more is needed of its learner


class EventStream:
    """Writes events; a reader that went away is no reason to stop the run."""

    def __init__(self, pipe: IO[str] | None = None) -> None:
        self._pipe = pipe or sys.stdout

    def emit(self, kind: str, **fields: Any) -> None:
        try:
            print(json.dumps({"event": kind, **fields}), file=self._pipe, flush=True)
        except (BrokenPipeError, ValueError):
            self._pipe = open("/dev/null", "w", encoding="utf-8")


def parse_event(line: str) -> dict[str, Any] | None:
    """An event, or None for a line that is something else (a library's print)."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "event" in event else None


class EventLog:
    """The file of a run's events. A disk that is full is no reason to end the run: what cannot be written is not there."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[str] | None = None

    def __enter__(self) -> "EventLog":
        with contextlib.suppress(OSError):
            self._file = self._path.open("a", buffering=1, encoding="utf-8")
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()

    def append(self, event: dict[str, Any]) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.write(json.dumps({"time": now(), **event}) + "\n")
