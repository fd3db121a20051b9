"""What a log says first of why its process ended.

One error is told many times: by the worker that met it, by its engine, by the server, each with a traceback of its own and
a line that points upwards. Those that stand together at the end are of one failure, and the first of them is its cause.
"""

import re
import signal
from collections.abc import Iterator, Sequence

from msgspec import Struct

_MOST_LINES = 15
_MOST_CHARACTERS = 300
_APART = 30  # so many lines of other things between two errors make them two failures

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# `(EngineCore pid=12) ERROR 11-26 23:27:33 [core.py:1510] text`, or `2026-11-26 23:27:33,123 ERROR text`
_PREFIX = re.compile(
    r"(?P<who>\([\w-]+ pid=\d+\) )?"
    r"(?:(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]+\] ?"
    r"|[\d-]{10} [\d:,]+ (?P<ours>DEBUG|INFO|WARNING|ERROR|CRITICAL) )?"
)
_TRACEBACK = "Traceback (most recent call last):"
_EXCEPTION = re.compile(r"[A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit|Warning|Dead|Timeout)\w*(?::|$)|Exception: ")
# Errors that have no traceback.
_KNOWN = re.compile(
    r"Fatal Python error|terminate called|what\(\): |Segmentation fault|Bus error|Illegal instruction|std::bad_alloc"
    r"|CUDA error|CUDA out of memory|ncclSystemError|ncclInternalError|ncclUnhandledCudaError|NCCL WARN .*(?i:error|fail)"
    r"|error while loading shared libraries|symbol lookup error|No space left on device|Cannot allocate memory"
    r"|Address already in use|Too many open files|died unexpectedly|oom-kill|Out of memory"
    r"|^(?:\S+: )?error: "
)
# They point at another error.
_POINTS_AWAY = re.compile(
    r"(?i)see (?:the )?(?:root cause|stack ?trace)|root cause above|EngineDeadError|engine core initialization failed"
    r"|workerproc initialization failed|failed to start|output_handler failed|ChildFailedError|BrokenPipeError"
    r"|CancelledError"
)
_HINTS: dict[int, str] = {
    signal.SIGKILL: "which often means out of memory: see dmesg, or the memory limit of the job or container",
    signal.SIGBUS: "which often means that /dev/shm is full: see df /dev/shm, or the container's --shm-size",
    signal.SIGILL: "which means that it was built for another processor",
    signal.SIGXCPU: "which means that the limit of CPU time (ulimit -t) is reached",
    signal.SIGXFSZ: "which means that the limit of file sizes (ulimit -f) is reached",
}


class Cause(Struct, frozen=True):
    """
    Attributes:
        line: the error, in one line.
        lines: as they stand in the log.
    """

    line: str
    lines: list[str]


class _Error(Struct, frozen=True):
    """In the lines from `start` to before `end`; `text` is what it says. What only has the level of an error is often the
    heading of a traceback."""

    start: int
    end: int
    text: str
    context: list[str]
    is_heading: bool = False


def first_cause(lines: Sequence[str]) -> Cause | None:
    """None if no error stands there."""
    clean = [_COLOUR.sub("", line).rstrip() for line in lines]
    together: list[_Error] = []
    for error in _errors(clean):
        if together and error.start - together[-1].end > _APART:
            together = []
        together.append(error)
    if not together:
        return None
    own = [error for error in together if not _POINTS_AWAY.search(error.text)]
    cause = next((error for error in own if not error.is_heading), (own or together)[0])
    return Cause(" ".join(cause.text.split())[:_MOST_CHARACTERS], cause.context[-_MOST_LINES:])


def signal_hint(returncode: int | None) -> str:
    """What often stands behind the signal that ended a process; a shell or Slurm adds 128 to its number."""
    number = -returncode if returncode is not None and returncode < 0 else (returncode or 0) - 128
    return _HINTS.get(number, "")


def _errors(lines: Sequence[str]) -> Iterator[_Error]:
    place = 0
    while place < len(lines):
        who, level, text = _split(lines[place])
        if level in ("DEBUG", "INFO", "WARNING"):
            place += 1
        elif text.startswith(_TRACEBACK):
            error = _traceback(lines, place)
            yield error
            place = error.end
        elif level in ("ERROR", "CRITICAL") or _KNOWN.search(text):
            yield _Error(place, place + 1, text, [lines[place]], is_heading=not _KNOWN.search(text))
            place += 1
        else:
            place += 1


def _traceback(lines: Sequence[str], start: int) -> _Error:
    """Of one process: its lines may alternate with those of others, unless they have no prefix."""
    who, _, _ = _split(lines[start])
    told: list[str] = []
    said: list[str] = []
    end = start + 1
    for place in range(start + 1, len(lines)):
        whose, level, text = _split(lines[place])
        if whose != who:
            if who:  # another's line in between
                continue
            break
        if text.startswith(_TRACEBACK) or level in ("DEBUG", "INFO", "WARNING"):
            break
        if said and (not text or _ends_message(text)):
            break
        if said or (text and not text[0].isspace()):
            said.append(text)
        if set(text.strip()) != {"^"}:
            told.append(lines[place])
        end = place + 1
        if len(said) == _MOST_LINES // 2:
            break
    return _Error(start, end, " ".join(said) or _TRACEBACK, told[-_MOST_LINES:])


def _ends_message(text: str) -> bool:
    """An exception's message may have several lines; this one is of something else."""
    return bool(_EXCEPTION.match(text)) or "errors.pydantic.dev" in text or text.startswith(("Process ", "INFO: "))


def _split(line: str) -> tuple[str, str, str]:
    """Process, level and text."""
    found = _PREFIX.match(line)
    assert found is not None  # no part of it has to be there
    return found["who"] or "", found["level"] or found["ours"] or "", line[found.end() :]
