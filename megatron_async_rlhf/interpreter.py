"""What of the user's shell the interpreter itself has taken in by the time that this program begins."""

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
