"""Runs the points of a sweep one after the other, each as `async-rlhf train` in a process of its own.

    warm start (`async-rlhf sft`) ─> point ─> point ─> ... ─> exit code
                                       └── completed ones are skipped, interrupted ones continue from their checkpoint

A point that fails does not end the sweep: the sweep's exit code tells. Ctrl-C is passed on to the run under way, which
finishes its step and saves; a second one ends it at once.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.launch.child_command import (
    EXIT_COMPLETED,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    OWN_COMMAND,
    Commands,
    Limit,
)
from megatron_async_rlhf.launch.progress import progress_of
from megatron_async_rlhf.sweep.points import Point, Sweep
from megatron_async_rlhf.telemetry.files import RESOLVED_CONFIG
from megatron_async_rlhf.telemetry.summary import is_completed


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
        self._clock = clock
        self._commands = Commands(sweep.directory, note=note, command=command, clock=clock)

    def run(self, points: Sequence[Point], *, max_seconds: float | None) -> int:
        """Run what of `points` is not completed; no new one starts after `max_seconds`.

        Returns:
            The exit code: 0 all of `points` are completed, 1 one of them failed, 130 some are left to do.
        """
        began = self._clock()
        with self._commands:
            return self._run(points, lambda: max_seconds is not None and self._clock() - began >= max_seconds)

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
            if self._commands.is_interrupted or is_late():
                self._note(f"{len(todo) - number} points are left to do: the same command continues with them")
                codes.add(EXIT_INTERRUPTED)
                break
            self._note(f"[{number + 1}/{len(todo)}] {point.name}")
            codes.add(self._one("train", point.name, point.config))
            self._after_point()
        return next((code for code in (EXIT_FAILED, EXIT_INTERRUPTED) if code in codes), EXIT_COMPLETED)

    def _one(self, subcommand: str, name: str, config: RunConfig) -> int:
        resume = subcommand == "train" and progress_of(config).status == "interrupted"
        limit = Limit(key="sweep.point_timeout_s", seconds=self._sweep.section.point_timeout_s)
        return self._commands.run(subcommand, name, config, resume=resume, limit=limit)


def _is_made(start: RunConfig) -> bool:
    """The directory's name says what the start was made of; keys it does not depend on may have changed."""
    return is_completed(start.run.path)


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
