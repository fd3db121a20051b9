"""What a viewer does with the slices of trace.json, written after the rule of Perfetto's trace processor.

Slices of a thread are calls. They are taken by their start, equal ones as they come in the file; one that begins before
another of its thread has ended must end by then too, or it is dropped. An end is not part of its slice.
"""

from collections import defaultdict
from itertools import combinations
from typing import Any


def slices(trace: dict[str, Any]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """By the names of process and thread; a KeyError if a slice's thread has none."""
    metadata = [event for event in trace["traceEvents"] if event["ph"] == "M"]
    processes = {e["pid"]: e["args"]["name"] for e in metadata if e["name"] == "process_name"}
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in metadata if e["name"] == "thread_name"}
    assert len({thread for _, thread in threads}) == len(threads), "Perfetto names a thread by its id alone"
    found = defaultdict(list)
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            found[processes[event["pid"]], threads[event["pid"], event["tid"]]].append(event)
    return found


def dropped(trace: dict[str, Any]) -> list[str]:
    """Of each slice that would be, why."""
    bad = []
    for thread, events in slices(trace).items():
        bad += [f"{event['name']}: negative" for event in events if event["dur"] < 0]
        for before, event in combinations(sorted(events, key=lambda e: e["ts"]), 2):
            if event["ts"] < before["ts"] + before["dur"] < event["ts"] + event["dur"]:
                bad.append(f"{thread}: {event['name']} begins within {before['name']} and ends after it")
    return bad
