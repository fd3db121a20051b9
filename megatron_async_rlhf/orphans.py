"""What becomes of a process when the one that started it dies without a word."""

import ctypes
import os
import signal

_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def signal_on_death_of(parent: int, number: int = signal.SIGKILL) -> None:
    """The kernel sends this process the signal once its parent's thread that started it has ended.

    Ends this process if that has happened already. Loads nothing, so that it can be called between fork and exec.

    Args:
        parent: id of the process that started this one.
    """
    _LIBC.prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os._exit(1)
