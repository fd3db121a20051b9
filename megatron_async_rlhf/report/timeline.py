"""The timeline of `trace.json` as columns of small integers, which a page holds a million of."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_async_rlhf.errors import DataError
from megatron_async_rlhf.telemetry.files import TRACE

_TICK_US = 100  # of the columns
_OF_THE_LOOP = ("learner", "learner.0", "weights")  # processes of the trace whose last slice ends it
_NUMBERED = re.compile(r"^(\D+?) (\d.*)$")  # `push 7`, `steps 5 to 8`


def read_timeline(run_dir: Path, loop_s: float) -> dict[str, Any] | None:
    """None of a run that is still running, or was killed: it is written when a run ends.

    Args:
        loop_s: how long the RL loop took, or other training.

    Returns:
        `kinds`: what slices are, without their numbers; `tick_us`: what times are counted in; `loop`: begin and end of
        training, of its last start if the run was resumed; `lanes`, top to bottom: each
        with its `process` and `name`, and a column for each slice's `kind`, `number` (text, may be empty), `gap` (ticks
        since the slice before began), `ticks` (its length) and `about` (its other arguments, as text).

    Raises:
        DataError: the file is not a trace.
    """
    path = run_dir / TRACE
    try:
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
        processes = {event["pid"]: event["args"]["name"] for event in _named(events, "process_name")}
        lanes = {
            event["tid"]: {"process": processes[event["pid"]], "name": event["args"]["name"], "slices": []}
            for event in _named(events, "thread_name")
        }
        for event in events:
            if event["ph"] == "X":
                lanes[event["tid"]]["slices"].append(event)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: is not a trace that a run wrote ({error!r}); report on a copy without it") from None
    kinds: dict[str, int] = {}
    shown = [_columns(lane, kinds) for lane in lanes.values() if lane["slices"]]
    return {"tick_us": _TICK_US, "loop": _loop(lanes.values(), loop_s), "lanes": shown, "kinds": list(kinds)}


def _named(events: list[dict[str, Any]], what: str) -> Iterator[dict[str, Any]]:
    return (event for event in events if event["ph"] == "M" and event["name"] == what)


def _loop(lanes: Iterable[dict[str, Any]], loop_s: float) -> list[int]:
    """It ends with the last step or push."""
    ends = [event["ts"] + event["dur"] for lane in lanes for event in lane["slices"] if lane["process"] in _OF_THE_LOOP]
    end = max(ends, default=0)
    return [max(0, round(end - loop_s * 1e6)) // _TICK_US, end // _TICK_US]


def _columns(lane: dict[str, Any], kinds: dict[str, int]) -> dict[str, Any]:
    columns: dict[str, list] = {"kind": [], "number": [], "gap": [], "ticks": [], "about": []}
    before = 0
    for event in lane["slices"]:
        numbered = _NUMBERED.match(event["name"])
        kind, number = numbered.groups() if numbered else (event["name"], "")
        start = event["ts"] // _TICK_US
        columns["kind"].append(kinds.setdefault(kind, len(kinds)))
        columns["number"].append(number)
        columns["gap"].append(start - before)
        columns["ticks"].append((event["ts"] + event["dur"]) // _TICK_US - start)
        columns["about"].append(_about(event.get("args", {})))
        before = start
    return {"process": lane["process"], "name": lane["name"], **columns}


def _about(arguments: dict[str, Any]) -> str:
    """What a reader wants of them; the version is in the number of most slices."""
    return ", ".join(
        f"{value:,} {name}" if name != "version" else f"version {value}" for name, value in arguments.items()
    )
