"""A run outlives the terminal it was started from: signals of one that closes, and output that nobody reads any more."""

import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TextIO

Handler = Callable[[int, FrameType | None], None]

_ECHO_S = 2.0


@contextmanager
def handling_interrupts(handler: Handler) -> Iterator[None]:
    """Have `handler` called at SIGINT, SIGTERM and SIGHUP, and afterwards what was called before.

    A terminal that closes sends SIGHUP more than once, by itself and through the shell, and some send it after a SIGTERM:
    only one that comes first counts. Under `nohup` it stays ignored. A scheduler tells every process of a job, and a parent
    passes on what it is told: of SIGTERMs in quick succession one counts.
    """
    came = False
    terminated = -math.inf

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal came, terminated
        counts, came = number != signal.SIGHUP or not came, True  # at once: the next one may interrupt this
        if number == signal.SIGTERM:
            now = time.monotonic()
            counts = now - terminated > _ECHO_S
            terminated = now if counts else terminated
        if counts:
            handler(number, frame)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    previous = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in previous.items():
            signal.signal(number, earlier)


def outlive_readers() -> None:
    """From now on stdout and stderr may lose their terminal, or the other end of their pipe: what is printed then is lost."""
    sys.stdout, sys.stderr = _Lasting(sys.stdout), _Lasting(sys.stderr)


class _Lasting:
    """A text stream that takes what it is given, whether or not it can write it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._lose()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._lose()

    def _lose(self) -> None:
        """Also for what is still buffered, and for C libraries."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
