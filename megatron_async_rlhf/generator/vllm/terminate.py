"""Keeps SIGTERM from the processes of a vLLM server that was started with it blocked (`ProcessSpec.blocks_terminate`).

A process inherits the signals that its parent blocks, which would do, if Python did not unblock SIGTERM and SIGINT when it
starts the tracker of shared resources (`multiprocessing.resource_tracker`): the API server did that just before it
started its engine, which then ended on a SIGTERM in the middle of a push.
"""

import signal
from multiprocessing import resource_tracker


def keep_terminate_blocked() -> None:
    """If SIGTERM is blocked in this thread, keep it blocked, also in the processes that it starts from now on."""
    if signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ()):
        resource_tracker.ensure_running()  # once; what this process starts uses the same one
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
