"""Tells a sink that the run has ended, and waits for it no longer than a limit: machines are held as long as a run lasts."""

import logging
import threading
from typing import Any

from megatron_async_rlhf.telemetry.sinks.sink import Sink

_log = logging.getLogger(__name__)
_THREAD = "ending-sink"


def end_sink(sink: Sink, summary: dict[str, Any], *, failed: bool, timeout_s: float) -> bool:
    """Whether it took it in within that time; a sink that fails did. The run has ended as it has, in either case."""

    def end() -> None:
        try:
            sink.close(summary, failed=failed)
        except Exception:
            _log.exception("%s could not be told how the run ended", type(sink).__name__)

    thread = threading.Thread(target=end, name=_THREAD, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return not thread.is_alive()


def is_one_ending() -> bool:
    """Beyond its limit. Packages such as W&B's wait for their service once more when the interpreter ends."""
    return any(thread.name == _THREAD for thread in threading.enumerate())
