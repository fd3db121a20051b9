"""The interpreter that this program runs in: what it has taken in of the user's shell, and how it collects garbage."""

import gc
import os
import sys
from pathlib import Path

from megatron_async_rlhf.errors import ConfigError


def use_utf8() -> None:
    """Start again in UTF-8 mode unless file names are UTF-8 already: what a configuration names, and what this process and
    the others write, must be the same bytes under every locale. Does not return if it starts again."""
    if sys.getfilesystemencoding().lower() not in ("utf-8", "utf8") and not sys.flags.utf8_mode:
        program, *arguments = Path("/proc/self/cmdline").read_bytes().split(b"\0")[:-1]  # as bytes: nothing is lost
        os.execv(sys.executable, [program, b"-X", b"utf8", *arguments])


def print_anything() -> None:
    """A character that a terminal or file cannot show is no reason to end."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def check_working_directory() -> None:
    """
    Raises:
        ConfigError: there is none: somebody has removed it.
    """
    try:
        os.getcwd()
    except OSError as error:
        raise ConfigError(f"the working directory cannot be used ({error.strerror}); cd to one that is there") from None


def collect_rarely() -> None:
    """Have the garbage collector look for cycles after so many more objects than by default.

    A controller, also one that is simulated, makes and keeps millions of objects, hardly any of them in a cycle: by default
    looking at them took it a fifth of its time, and held its event loop up for tens of milliseconds.
    """
    gc.set_threshold(50_000, 20, 20)
