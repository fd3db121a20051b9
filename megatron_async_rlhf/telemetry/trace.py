"""The timeline of a run in Chrome's trace format: open trace.json in Perfetto or chrome://tracing."""

import json
from collections.abc import Sequence
from pathlib import Path

from megatron_async_rlhf.types import Span


def write_trace(path: Path, spans: Sequence[Span]) -> None:
    """One row per process, all on the machine's wall clock; times are microseconds since the first span."""
    processes = sorted({span.process for span in spans})
    origin = min((span.start for span in spans), default=0.0)
    events = [
        {"name": "process_name", "ph": "M", "pid": row, "args": {"name": process}}
        for row, process in enumerate(processes)
    ]
    events += [
        {
            "name": span.name,
            "ph": "X",
            "pid": processes.index(span.process),
            "tid": 0,
            "ts": round((span.start - origin) * 1e6),
            "dur": round((span.end - span.start) * 1e6),
        }
        for span in sorted(spans, key=lambda span: span.start)
    ]
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}), encoding="utf-8")
