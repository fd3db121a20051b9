"""Runs the points of a sweep one after the other, each as `async-rlhf train` in a process of its own.

    warm start (`async-rlhf sft`) ─> point ─> point ─> ... ─> exit code
                                       └── completed ones are skipped, interrupted ones go on from their checkpoint

A point that fails does not end the sweep: the sweep's exit code tells. Ctrl-C is passed on to the run under way, which
finishes its step and saves; a second one ends it at once.
"""

import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from megatron_async_rlhf.config.load import dump_config
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.launch.plan import ProcessSpec
from megatron_async_rlhf.launch.process import LocalProcess, Process
from megatron_async_rlhf.launch.terminal import handle_interrupts
from megatron_async_rlhf.sweep.points import Point, Sweep
from megatron_async_rlhf.sweep.progress import progress_of
from megatron_async_rlhf.telemetry.files import LOG_DIR, RESOLVED_CONFIG, replace_file, writing
from megatron_async_rlhf.telemetry.summary import read_summary

OWN_COMMAND = (sys.executable, "-m", "megatron_async_rlhf")
EXIT_COMPLETED, EXIT_FAILED, EXIT_INTERRUPTED = 0, 1, 130
CONFIG_DIR = "configs"
_POLL_S = 0.1


class Driver:
    """One start of a sweep.

    Args:
        note: takes a line for who watches.
        after_point: called after every point that ran.
        command: what stands for `async-rlhf`.
        clock: seconds, for the limits on time.
    """

    def __init__(
        self,
        sweep: Sweep,
        *,
        note: Callable[[str], None],
        after_point: Callable[[], object],
        command: Sequence[str] = OWN_COMMAND,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sweep = sweep
        self._note = note
        self._after_point = after_point
        self._command = command
        self._clock = clock
        self._interrupts = 0
        self._process: Process | None = None

    def run(self, points: Sequence[Point], *, max_seconds: float | None) -> int:
        """Run what of `points` is not completed; no new one starts after `max_seconds`.

        Returns:
            The exit code: 0 all of `points` are completed, 1 one of them failed, 130 some are left to do.
        """
        began = self._clock()
        previous = handle_interrupts(self._on_interrupt)
        try:
            return self._run(points, lambda: max_seconds is not None and self._clock() - began >= max_seconds)
        finally:
            if self._process is not None:
                self._process.kill_group(signal.SIGKILL)
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _run(self, points: Sequence[Point], is_late: Callable[[], bool]) -> int:
        todo = [point for point in points if progress_of(point.config).status != "completed"]
        self._note(f"{len(points) - len(todo)} of {len(points)} points are completed, {len(todo)} to do")
        start = self._sweep.warm_start
        if todo and start is not None and not _is_made(start) and not is_late():
            code = self._one("sft", "warm start", start)
            if code != EXIT_COMPLETED:
                return code
        codes = set()
        for number, point in enumerate(todo):
            if self._interrupts or is_late():
                self._note(f"{len(todo) - number} points are left to do: the same command goes on with them")
                codes.add(EXIT_INTERRUPTED)
                break
            self._note(f"[{number + 1}/{len(todo)}] {point.name}")
            codes.add(self._one("train", point.name, point.config))
            self._after_point()
        return next((code for code in (EXIT_FAILED, EXIT_INTERRUPTED) if code in codes), EXIT_COMPLETED)

    def _one(self, subcommand: str, name: str, config: RunConfig) -> int:
        """Run one and say how it ended, to whoever watches and as one of the exit codes."""
        file = self._sweep.directory / CONFIG_DIR / f"{config.run.path.name}.yaml"
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_file(file, dump_config(config))
        resume = subcommand == "train" and progress_of(config).status == "interrupted"
        flags = ["--resume"] if resume else []
        logs = self._sweep.directory / LOG_DIR
        with writing(logs):
            logs.mkdir(exist_ok=True)
        spec = ProcessSpec(
            name=config.run.path.name,
            arguments=[*self._command, subcommand, str(file), *flags],
            environment={},
            cores=[],
        )
        began = self._clock()
        with writing(logs / f"{spec.name}.log"):
            self._process = process = LocalProcess(spec, logs)
        ended_in_time = self._wait(process, config)
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
            reason = f"it took longer than sweep.point_timeout_s = {self._sweep.section.point_timeout_s:g}"
        elif returned == EXIT_COMPLETED:
            reason = f"its {RESOLVED_CONFIG} is not what it was given: was the program changed meanwhile? start again"
        else:
            cause = process.cause()
            last = [cause.line] if cause else process.last_lines(1) or [process.ending()]
            reason = progress.error or last[0]
        self._note(f"{name}: failed after {seconds}: {reason}; see {process.log}")
        return EXIT_FAILED

    def _wait(self, process: Process, config: RunConfig) -> bool:
        """For the end of the process, passing on interrupts; False if it had to be ended for its time."""
        deadline = self._clock() + self._sweep.section.point_timeout_s
        passed_on = 0
        while process.returncode is None:
            if self._interrupts > passed_on:
                passed_on = self._interrupts
                process.signal(signal.SIGTERM)
                # It ends itself within this; another interrupt would make it end at once.
                grace = config.launch.interrupt_grace_s + 2 * config.launch.shutdown_grace_s
                deadline = min(deadline, self._clock() + grace)
            if self._clock() > deadline:
                self._end(process, config)
                return False
            time.sleep(_POLL_S)
        return True

    def _end(self, process: Process, config: RunConfig) -> None:
        """Twice, which makes a run end without saving; then by force, which takes all its processes along."""
        deadline = self._clock() + 2 * config.launch.shutdown_grace_s
        for _ in range(2):
            process.signal(signal.SIGTERM)
            time.sleep(2 * _POLL_S)
        while process.returncode is None and self._clock() < deadline:
            time.sleep(_POLL_S)
        process.kill_group(signal.SIGKILL)

    def _on_interrupt(self, number: int, frame: object) -> None:
        self._interrupts += 1


def _is_made(start: RunConfig) -> bool:
    """The directory's name says what the start was made of; keys it does not depend on may have changed."""
    return read_summary(start.run.path).get("status") == "completed"


def parse_only(filters: Iterable[str]) -> dict[str, list[str]]:
    """`axis=label,label` of the command line.

    Raises:
        ConfigError: one that looks otherwise.
    """
    rule: dict[str, list[str]] = {}
    for text in filters:
        axis, separator, labels = text.partition("=")
        if not separator or not axis or not labels:
            raise ConfigError(f"--only {text!r} must look like axis=label or axis=label,label")
        rule.setdefault(axis, []).extend(labels.split(","))
    return rule


def check_directory(directory: Path) -> None:
    """
    Raises:
        ConfigError: the sweep's directory holds an ordinary run.
    """
    if (directory / RESOLVED_CONFIG).exists():
        raise ConfigError(
            f"run.dir = {directory} is a run's directory, not a sweep's; choose another run.name or run.dir"
        )
