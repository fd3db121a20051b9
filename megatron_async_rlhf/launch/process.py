"""One process of a run, wherever it runs: its own session, log file and temporary directory, dies with who started it."""

import contextlib
import os
import signal
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from megatron_async_rlhf.environment import child_environment
from megatron_async_rlhf.launch.causes import Cause, first_cause
from megatron_async_rlhf.launch.plan import ProcessSpec
from megatron_async_rlhf.launch.scratch import Scratch
from megatron_async_rlhf.learner.protocol import DUMP_STACKS
from megatron_async_rlhf.orphans import signal_on_death_of

_GONE_S = 5.0  # until nothing of a killed group is there any more; a driver may hold a process that long
_POLL_S = 0.02
_LOG_BYTES = 2**21  # of its end, where the cause of a failure is looked for


class Process(ABC):
    """A started `ProcessSpec`."""

    def __init__(self, spec: ProcessSpec, log_dir: Path) -> None:
        self.spec = spec
        self.log = log_dir / f"{spec.name}.log"
        self._log_began = self.log.stat().st_size if self.log.exists() else 0  # an earlier start's is not ours

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    @abstractmethod
    def pid(self) -> int | None:
        """On its own machine; None if not known yet."""

    @property
    @abstractmethod
    def returncode(self) -> int | None:
        """None while it runs; negative if a signal ended it."""

    @abstractmethod
    def signal(self, number: int) -> None:
        """To the process alone."""

    @abstractmethod
    def ask_for_stacks(self) -> None:
        """Let a learner rank write where it is into its log."""

    @property
    @abstractmethod
    def has_told_stacks(self) -> bool:
        """Since it was asked. Its own machine can tell: to others a file system may show what it writes half a minute later."""

    @abstractmethod
    def kill_group(self, number: int) -> None:
        """To the process and everything it started, even if it is gone itself."""

    def clean_up(self) -> None:
        """Once it is killed: wait until all of it is gone, and remove what it has left. Another machine's agent does so there."""

    def ending(self) -> str:
        """How it ended, in words."""
        code = self.returncode
        if code is None:
            return "is still running"
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def last_lines(self, count: int = 15) -> list[str]:
        """The end of its log."""
        return self._log_lines()[-count:]

    def cause(self) -> Cause | None:
        """What its log says first of why it ended, since this start of it."""
        return first_cause(self._log_lines())

    def _log_lines(self) -> list[str]:
        try:
            with self.log.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(self._log_began, size - _LOG_BYTES))
                return file.read().decode(errors="replace").splitlines()
        except OSError:
            return []


class LocalProcess(Process):
    """A child of this process. `pipe_stdout` gives the caller its stdout; everything else goes to the log."""

    def __init__(self, spec: ProcessSpec, log_dir: Path, *, pipe_stdout: bool = False) -> None:
        super().__init__(spec, log_dir)
        self._scratch = Scratch()
        self._is_cleaned_up, self._log_when_asked = False, 0
        try:
            self._popen = self._start(pipe_stdout)
        except BaseException:
            self._scratch.remove()
            raise

    def _start(self, pipe_stdout: bool) -> subprocess.Popen[str]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                self.spec.arguments,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if pipe_stdout else log,
                stderr=log,
                env=child_environment(os.environ, {**self.spec.environment, **self._scratch.environment}),
                start_new_session=True,  # a Ctrl-C in the terminal reaches the supervisor alone
                preexec_fn=_before_exec(self.spec),
                encoding="utf-8",
                errors="replace",
            )

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def stdout(self) -> IO[str]:
        assert self._popen.stdout is not None  # else the log has it
        return self._popen.stdout

    @property
    def returncode(self) -> int | None:
        return self._popen.poll()

    def signal(self, number: int) -> None:
        if self.returncode is None:
            self._popen.send_signal(number)

    def ask_for_stacks(self) -> None:
        self._log_when_asked = self._log_size
        self.signal(DUMP_STACKS)

    @property
    def has_told_stacks(self) -> bool:
        return self._log_size > self._log_when_asked

    @property
    def _log_size(self) -> int:
        return self.log.stat().st_size if self.log.exists() else 0

    def kill_group(self, number: int) -> None:
        if self._is_cleaned_up:  # by now the number may be another's
            return
        self._scratch.note_shared(_group(self._popen.pid))
        try:
            if number == signal.SIGKILL:
                self._kill_owners()
            else:
                os.killpg(self._popen.pid, number)
        except ProcessLookupError:
            pass

    def clean_up(self) -> None:
        if self._is_cleaned_up:
            return
        deadline = time.monotonic() + _GONE_S
        while not (is_gone := not any(_group(self._popen.pid))) and time.monotonic() < deadline:
            self._kill_owners()  # what was started meanwhile, too
            time.sleep(_POLL_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._scratch.remove()
        self._is_cleaned_up = is_gone

    def _kill_owners(self) -> None:
        """All but Python's resource trackers, which remove the shared memory and semaphores of who is killed, then end."""
        for pid in _group(self._popen.pid):
            with contextlib.suppress(OSError):
                if b"multiprocessing.resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)


def _group(leader: int) -> Iterator[int]:
    """Ids of a process group's members that have not ended."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            state, _, group = path.read_text(encoding="utf-8").rpartition(")")[2].split()[:3]
            if int(group) == leader and state not in "ZX":
                yield int(path.parent.name)


def _before_exec(spec: ProcessSpec):
    """Runs in the child between fork and exec."""
    parent, orphan_signal = os.getpid(), spec.orphan_signal or spec.end_signal

    def prepare() -> None:
        # Without this a killed supervisor would leave servers behind that hold ports and memory.
        signal_on_death_of(parent, orphan_signal)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what becomes of a terminal is its parent's affair
        if spec.blocks_terminate:  # blocked, not ignored: what it runs would set a handler of its own
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        if spec.cores:
            os.sched_setaffinity(0, spec.cores)

    return prepare
