"""The controller's progress as one JSON object per line on a pipe: what a terminal, or a test, can follow live."""

import json
import sys
from typing import IO, Any


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
