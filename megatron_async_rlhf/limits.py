"""Limits that a shell or a container sets for a process and all that it starts; the soft ones are ours to raise."""

import contextlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import psutil

# What no part of a run can be told to do with less of: name, unit, and the letter that `ulimit` has for it. Torch and vLLM
# reserve far more addresses than they use, and a process above its CPU time is killed, however much is done.
_UNLIMITED = {
    resource.RLIMIT_AS: ("virtual memory", "bytes", "v"),
    resource.RLIMIT_DATA: ("data segments", "bytes", "d"),
    resource.RLIMIT_CPU: ("CPU time of a process", "seconds", "t"),
    resource.RLIMIT_FSIZE: ("size of a file", "bytes", "f"),
}
_RAISED = (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC, resource.RLIMIT_MEMLOCK, *_UNLIMITED)
# Of open files no more than this: where a container allows a thousand millions, some programs make a table of that size.
_MOST_FILES = 65536
_PIDS = Path("/sys/fs/cgroup")


def raise_soft_limits() -> None:
    """As far as the hard ones allow; vLLM and the ranks inherit them."""
    for limit in _RAISED:
        soft, hard = resource.getrlimit(limit)
        most = hard
        if limit == resource.RLIMIT_NOFILE and (hard == resource.RLIM_INFINITY or hard > _MOST_FILES):
            most = _MOST_FILES
        if soft != resource.RLIM_INFINITY and (most == resource.RLIM_INFINITY or most > soft):
            with contextlib.suppress(
                ValueError, OSError
            ):  # a container may forbid it: then it is as if the hard one were it
                resource.setrlimit(limit, (most, hard))


def limit_problems() -> list[str]:
    """A line for each limit that a run cannot work under, whatever its configuration."""
    found = []
    for limit, (what, unit, letter) in _UNLIMITED.items():
        soft = resource.getrlimit(limit)[0]
        if soft != resource.RLIM_INFINITY:
            found.append(
                f"{what}: the limit is {soft} {unit}, and a run needs this unlimited; raise it (ulimit -{letter} unlimited, "
                "as root if it is a hard limit), or start the run in a job without it"
            )
    return found


def open_files() -> int:
    """How many this process may have."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _MOST_FILES if soft == resource.RLIM_INFINITY else soft


def threads_left() -> int | None:
    """How many more threads all processes of this user, or of this container, may have; None if nobody counts."""
    counts = [*_of_user(), *_of_container()]
    return max(0, min(counts)) if counts else None


def _of_user() -> Iterator[int]:
    soft = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    if soft == resource.RLIM_INFINITY or os.geteuid() == 0:  # who has the capabilities of root is not counted
        return
    used = 0
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            used += process.num_threads() if process.uids().real == os.getuid() else 0
    yield soft - used


def _of_container() -> Iterator[int]:
    with contextlib.suppress(OSError, ValueError):  # "max" is no number
        yield int((_PIDS / "pids.max").read_text(encoding="utf-8")) - int(
            (_PIDS / "pids.current").read_text(encoding="utf-8")
        )
