"""Runs commands of `async-rlhf` one after the other, each in a process of its own: what a sweep and a pipeline are made of.

Ctrl-C is passed on to the command under way, which finishes its step and saves; a second one ends it at once. A file `stop` asks
for the same where whoever asks is no parent of these processes, as a job of a cluster is not.
"""

import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from msgspec import Struct

from megatron_async_rlhf.config.load import dump_config
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.launch.plan import ProcessSpec
from megatron_async_rlhf.launch.process import LocalProcess, Process
from megatron_async_rlhf.launch.progress import progress_of
from megatron_async_rlhf.launch.terminal import handling_interrupts
from megatron_async_rlhf.telemetry.files import LOG_DIR, RESOLVED_CONFIG, STOP, replace_file, writing

OWN_COMMAND = (sys.executable, "-m", "megatron_async_rlhf")
EXIT_COMPLETED, EXIT_FAILED, EXIT_INTERRUPTED = 0, 1, 130
CONFIG_DIR = "configs"
_POLL_S = 0.1
_WATCH_S = 1.0  # a log is read for it, beside whoever is to have the cores


class Limit(Struct, frozen=True, kw_only=True):
    """How long a command may take, and the key of the configuration that says so."""

    key: str
    seconds: float


class Commands:
    """Use it as a context: inside, interrupts are passed on, and at its end nothing of a command is left."""

    def __init__(
        self,
        directory: Path,
        *,
        note: Callable[[str], None],
        command: Sequence[str] = OWN_COMMAND,
        clock: Callable[[], float] = time.monotonic,
        watch: Callable[[str], None] | None = None,
        heeds_stop: bool = False,
    ) -> None:
        """
        Args:
            directory: of configurations and logs.
            note: takes a line for who watches.
            command: what stands for `async-rlhf`.
            clock: seconds, for the limits on time.
            watch: takes the last line of the command under way, again and again.
            heeds_stop: a file `stop` in the directory is an interrupt too.
        """
        self._stop_file = directory / STOP if heeds_stop else None
        self._directory, self._note, self._command, self._clock = directory, note, command, clock
        self._watch = watch
        self._interrupts = 0
        self._handling = ExitStack()
        self._process: Process | None = None

    @property
    def is_interrupted(self) -> bool:
        return self._interrupts > 0

    def __enter__(self) -> Self:
        self._handling.enter_context(handling_interrupts(self._on_interrupt))
        return self

    def __exit__(self, *error: object) -> None:
        if self._process is not None:
            self._process.kill_group(signal.SIGKILL)
        self._handling.close()

    def run(
        self, subcommand: str, name: str, config: RunConfig, *, resume: bool = False, limit: Limit | None = None
    ) -> int:
        """Run one in `run.dir` and say how it ended, to whoever watches and as one of the exit codes.

        Args:
            name: for who watches.
        """
        process = self._start(subcommand, config, resume)
        began = self._clock()
        ended_in_time = self._wait(process, config, limit)
        process.clean_up()
        seconds = f"{self._clock() - began:.0f} s"
        progress, returned = progress_of(config), process.returncode
        if returned == EXIT_COMPLETED and progress.status == "completed":
            self._note(f"{name}: completed in {seconds}")
            return EXIT_COMPLETED
        if ended_in_time and (self._interrupts or returned == EXIT_INTERRUPTED):
            self._note(f"{name}: interrupted after {seconds}")
            return EXIT_INTERRUPTED
        if not ended_in_time:
            assert limit is not None  # without one there is time
            reason = f"it took longer than {limit.key} = {limit.seconds:g}"
        elif returned == EXIT_COMPLETED:
            reason = f"its {RESOLVED_CONFIG} is not what it was given: was the program changed meanwhile? start again"
        else:
            cause = process.cause()
            last = [cause.line] if cause else process.last_lines(1) or [process.ending()]
            reason = progress.error or last[0]
        self._note(f"{name}: failed after {seconds}: {reason}; see {process.log}")
        return EXIT_FAILED

    def _start(self, subcommand: str, config: RunConfig, resume: bool) -> Process:
        file = self._directory / CONFIG_DIR / f"{config.run.path.name}.yaml"
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_file(file, dump_config(config))
        logs = self._directory / LOG_DIR
        with writing(logs):
            logs.mkdir(exist_ok=True)
        spec = ProcessSpec(
            name=config.run.path.name,
            arguments=[*self._command, subcommand, str(file), *(["--resume"] if resume else [])],
            environment={},
            cores=[],
        )
        with writing(logs / f"{spec.name}.log"):
            self._process = LocalProcess(spec, logs)
        return self._process

    def _wait(self, process: Process, config: RunConfig, limit: Limit | None) -> bool:
        """For the end of the process, passing on interrupts; False if it had to be ended for its time."""
        deadline = float("inf") if limit is None else self._clock() + limit.seconds
        passed_on, shown_again = 0, self._clock()
        while process.returncode is None:
            self._look_for_stop()
            if self._interrupts > passed_on:
                for number in range(passed_on, self._interrupts):  # of SIGTERMs in quick succession one counts
                    process.signal(signal.SIGINT if number else signal.SIGTERM)
                passed_on = self._interrupts
                # It ends itself within this; another interrupt would make it end at once.
                grace = config.launch.interrupt_grace_s + 2 * config.launch.shutdown_grace_s
                deadline = min(deadline, self._clock() + grace)
                limit = limit or Limit(key="launch.interrupt_grace_s", seconds=config.launch.interrupt_grace_s)
            if self._clock() > deadline:
                self._end(process, config)
                return False
            if self._watch is not None and self._clock() >= shown_again:
                shown_again = self._clock() + _WATCH_S
                self._watch(f"{process.name}: {''.join(process.last_lines(1))}")
            time.sleep(_POLL_S)
        return True

    def _end(self, process: Process, config: RunConfig) -> None:
        """In two ways, which makes a run end without saving; then by force, which takes all its processes along."""
        deadline = self._clock() + 2 * config.launch.shutdown_grace_s
        for number in (signal.SIGTERM, signal.SIGINT):
            process.signal(number)
            time.sleep(2 * _POLL_S)
        while process.returncode is None and self._clock() < deadline:
            time.sleep(_POLL_S)
        process.kill_group(signal.SIGKILL)

    def _look_for_stop(self) -> None:
        if self._stop_file is None or not self._stop_file.exists():
            return
        self._interrupts += 1
        try:
            self._stop_file.unlink()
        except OSError:  # somebody else's, perhaps: it has been seen, and asks no second time
            self._stop_file = None

    def _on_interrupt(self, number: int, frame: object) -> None:
        self._interrupts += 1
