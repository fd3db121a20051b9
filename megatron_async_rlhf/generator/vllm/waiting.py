"""How the processes of one vLLM server wait for each other on a CPU: asleep.

vLLM's engine and workers look at a shared buffer again and again for a second after each message, and the engine does
nothing else while a worker computes. That is free where cores are idle. Here they are the cores of other workers and of
the learner: with a reward model's server beside a generator on one core, steps took three times as long.
"""

import time

from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

# Notifications get lost: those sent within about a millisecond of another one, as vLLM lets one wait in the socket at most. So a
# reader that has not read for a while sleeps about as long as that before it looks itself, between these two.
_SHORTEST_SLEEP_MS, _LONGEST_SLEEP_MS = 1, 20
_wait = SpinCondition.wait


def wait_asleep() -> None:
    """From now on, in this process."""
    SpinCondition.wait = _asleep


def _asleep(condition: SpinCondition, timeout_ms: int | None = None) -> None:
    condition.busy_loop_s = 0.0
    since_last_ms = int(1000 * (time.monotonic() - condition.last_read))
    sleep_ms = min(max(since_last_ms, _SHORTEST_SLEEP_MS), _LONGEST_SLEEP_MS)
    _wait(condition, sleep_ms if timeout_ms is None else min(timeout_ms, sleep_ms))
