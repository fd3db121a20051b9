"""What has become of jobs that Slurm was given; asks `squeue`, and `sacct` for those it has forgotten."""

import time
from collections.abc import Callable, Sequence

import invoke
import nemo_run as run
import paramiko
from msgspec import Struct

from megatron_async_rlhf.errors import SubmissionError

COMPLETED, UNKNOWN = "COMPLETED", "UNKNOWN"
_ENDED = {
    COMPLETED, UNKNOWN, "BOOT_FAIL", "CANCELLED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED",
    "REVOKED", "TIMEOUT",
}  # fmt: skip
_POLL_S = 5.0
_ANSWER_TIMEOUT_S = 60.0  # of one question
_SILENCE_TIMEOUT_S = 600.0  # of the cluster: a controller may be restarted meanwhile


class QueuedJob(Struct, frozen=True, kw_only=True):
    """
    Attributes:
        log: of the stage, on the cluster.
        tunnel: to where Slurm's commands are.
    """

    name: str
    job_id: str
    nodes: int
    log: str
    tunnel: run.LocalTunnel | run.SSHTunnel


def follow(jobs: Sequence[QueuedJob], note: Callable[[str], None]) -> bool:
    """Wait until all have ended, telling every change; whether all completed. How long a job waits is Slurm's affair.

    Raises:
        SubmissionError: the cluster has given no answer for `_SILENCE_TIMEOUT_S`. The jobs continue.
    """
    states: dict[str, str] = {}
    heard = time.monotonic()
    while True:
        found = _ask(jobs)
        if found is not None:
            heard = time.monotonic()
            # Slurm forgets a job minutes after its end (MinJobAge); what it has said of it stays.
            found |= {id: states[id] for id, state in found.items() if state == UNKNOWN and states.get(id) in _ENDED}
            for job in jobs:
                if states.get(job.job_id) != found[job.job_id]:
                    note(f"{job.name}: {found[job.job_id].lower()}")
            states = found
            if set(states.values()) <= _ENDED:
                return set(states.values()) == {COMPLETED}
        elif time.monotonic() - heard > _SILENCE_TIMEOUT_S:
            raise SubmissionError(
                f"squeue has not answered for {_SILENCE_TIMEOUT_S:g} s; the jobs {_ids(jobs, ' ')} were submitted"
            )
        time.sleep(_POLL_S)


def _ask(jobs: Sequence[QueuedJob]) -> dict[str, str] | None:
    """Job id -> state; None if there was no answer."""
    listed = _run(jobs, f"squeue --noheader --states=all --format='%i|%T' --jobs={_ids(jobs, ',')}")
    if listed is None:
        return None
    states = _parse(listed)
    if missing := [job for job in jobs if job.job_id not in states]:
        states |= _parse(_run(missing, f"sacct -n -X -P -o JobID,State -j {_ids(missing, ',')}") or "")
    return {job.job_id: states.get(job.job_id, UNKNOWN) for job in jobs}


def _run(jobs: Sequence[QueuedJob], command: str) -> str | None:
    try:
        result = jobs[0].tunnel.run(command, warn=True, timeout=_ANSWER_TIMEOUT_S)
    except (OSError, EOFError, paramiko.SSHException, invoke.exceptions.CommandTimedOut):
        return None
    except SystemExit:  # NeMo-Run's way of saying that it has no login (any more)
        return None
    if result.ok:
        return result.stdout
    return "" if "Invalid job id" in result.stderr else None  # forgotten, which is an answer


def _parse(lines: str) -> dict[str, str]:
    pairs = [line.strip().split("|") for line in lines.splitlines() if "|" in line]
    return {job_id: state.split()[0] for job_id, state, *_ in pairs if state}  # `CANCELLED by 0`


def _ids(jobs: Sequence[QueuedJob], separator: str) -> str:
    return separator.join(job.job_id for job in jobs)
