"""Which learner ranks are alive only by name: asked for their stacks, they write nothing.

When one rank is stopped all others wait for it, and each accuses whom it happens to wait for. A rank that waits, in Python
or in a collective, still writes its stacks into its log when it is told to (`faulthandler`); one that is stopped does not.
"""

import time
from collections.abc import Sequence

from megatron_async_rlhf.launch.process import Process

_REACTION_S = 3.0
_POLL_S = 0.05


def dump_stacks(ranks: Sequence[Process]) -> list[Process]:
    """Let every rank that runs write its stacks into its log; returns those that did not."""
    silent = [rank for rank in ranks if rank.returncode is None]
    for rank in silent:
        rank.ask_for_stacks()
    deadline = time.monotonic() + _REACTION_S
    while silent and time.monotonic() < deadline:
        time.sleep(_POLL_S)
        silent = [rank for rank in silent if rank.returncode is None and not rank.has_told_stacks]
    return silent
