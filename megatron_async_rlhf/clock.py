"""The time of day that advances steadily: a clock that is set during a run changes no duration, deadline or order in it."""

import time

_STARTED, _BEGAN = time.time(), time.monotonic()


def now() -> float:
    """Seconds since the epoch, as the machine's clock had it when this process started, and steadily on from there."""
    return _STARTED + time.monotonic() - _BEGAN
