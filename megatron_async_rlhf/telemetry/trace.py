"""The timeline of a run in Chrome's trace format: open trace.json in Perfetto or chrome://tracing.

A viewer takes the slices of a thread for calls: each must end before the next begins, or within the one around it.
Perfetto drops a slice that breaks this. So what a lane cannot hold goes into a second row beside it.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_async_rlhf.telemetry.files import replace_file
from megatron_async_rlhf.types import Span

_Row = tuple[str, str, int]  # process, lane, and the row of the lane, counted from 0


def write_trace(path: Path, spans: Sequence[Span]) -> None:
    """A process for each `Span.process`, a thread for each of its lanes, all on the machine's wall clock.

    Times are whole microseconds since the first span.
    """
    replace_file(path, json.dumps({"traceEvents": trace_events(spans), "displayTimeUnit": "ms"}))


def trace_events(spans: Sequence[Span]) -> list[dict[str, Any]]:
    """Names of processes and threads, then the slices in the order in which they begin, outer ones first."""
    origin = min((span.start for span in spans), default=0.0)
    timed = [(_microseconds(span.start - origin), _microseconds(span.end - origin), span) for span in spans]
    timed = [(start, max(start, end), span) for start, end, span in timed]  # a clock may have been set back meanwhile
    timed.sort(key=lambda one: (one[0], -one[1]))
    placed = list(_place(timed))
    rows = sorted({row for row, _, _, _ in placed}, key=_by_number)
    # Thread ids differ throughout the trace: Perfetto names a thread by its id alone. Neither id is 0, the idle thread's.
    processes = {name: number for number, name in enumerate(dict.fromkeys(row[0] for row in rows), 1)}
    threads = {row: len(processes) + number for number, row in enumerate(rows, 1)}
    events = [
        {"name": "process_name", "ph": "M", "pid": number, "args": {"name": name}} for name, number in processes.items()
    ]
    events += [
        {"name": "thread_name", "ph": "M", "pid": processes[row[0]], "tid": thread, "args": {"name": _name(row)}}
        for row, thread in threads.items()
    ]
    for row, start, end, span in placed:
        event = {"name": span.name, "ph": "X", "pid": processes[row[0]], "tid": threads[row], "ts": start}
        events.append(event | {"dur": end - start} | ({"args": span.args} if span.args else {}))
    return events


def _place(timed: Sequence[tuple[int, int, Span]]) -> Iterator[tuple[_Row, int, int, Span]]:
    """Each span with the first row of its lane in which it follows or nests."""
    open_ends: dict[tuple[str, str], list[list[int]]] = {}  # of each row of a lane: ends of the slices it is inside
    for start, end, span in timed:
        rows = open_ends.setdefault((span.process, span.lane), [])
        for ends in rows:
            while ends and ends[-1] <= start:
                ends.pop()
        place = next((i for i, ends in enumerate(rows) if not ends or end <= ends[-1]), len(rows))
        if place == len(rows):
            rows.append([])
        rows[place].append(end)
        yield (span.process, span.lane, place), start, end, span


def _name(row: _Row) -> str:
    process, lane, place = row
    return (lane or process) + (f" ({place + 1})" if place else "")


def _by_number(row: _Row) -> list[str | int]:
    """generator.2 comes before generator.10."""
    parts = re.split(r"(\d+)", "/".join(map(str, row)))
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]


def _microseconds(seconds: float) -> int:
    return round(seconds * 1e6)
