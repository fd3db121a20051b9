"""How the processes of one vLLM server wait for each other on a CPU: asleep.

vLLM's engine and workers look at a shared buffer again and again for a second after each message, and the engine does
nothing else while a worker computes. That is free where cores are idle. Here they are the cores of other workers and of
the learner: with a reward model's server beside a generator on one core, steps took three times as long.
"""

from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

# A notification that is sent before its reader has subscribed is lost.
_LONGEST_SLEEP_MS = 20
_wait = SpinCondition.wait


def wait_asleep() -> None:
    """From now on, in this process."""
    SpinCondition.wait = _asleep


def _asleep(condition: SpinCondition, timeout_ms: int | None = None) -> None:
    condition.busy_loop_s = 0.0
    _wait(condition, _LONGEST_SLEEP_MS if timeout_ms is None else min(timeout_ms, _LONGEST_SLEEP_MS))
