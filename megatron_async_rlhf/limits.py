"""Limits that a shell or a container sets for a process and all that it starts; the soft ones are ours to raise."""

import contextlib
import resource

_RAISED = (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC, resource.RLIMIT_MEMLOCK)
# Of open files no more than this: where a container allows a thousand millions, some programs make a table of that size.
_MOST_FILES = 65536


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


def open_files() -> int:
    """How many this process may have."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _MOST_FILES if soft == resource.RLIM_INFINITY else soft
