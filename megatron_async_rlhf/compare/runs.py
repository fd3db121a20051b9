"""What a run tells a comparison, read from its directory: its schedule and seed, times of both sides, rewards over steps and
over seconds."""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from msgspec import Struct, ValidationError

from megatron_async_rlhf.compare.schedules import Schedule, schedule_of
from megatron_async_rlhf.config.load import load_config
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.evaluation.wins import wins
from megatron_async_rlhf.telemetry.files import (
    EVALUATIONS,
    METRICS,
    RESOLVED_CONFIG,
    check_is_run,
    read_lines,
    read_steps,
)
from megatron_async_rlhf.telemetry.summary import read_figures

WINDOW = 0.1  # of the steps: rewards of training are means over so many, as a single step's is mostly noise
# What runs that are compared may differ in: the seed, the schedule, where processes are and what is written.
_MAY_DIFFER = {
    "run": None,
    "launch": None,
    "telemetry": None,
    "checkpoint": None,
    "sweep": None,
    "schedule": {
        "mode",
        "max_staleness",
        "generation",
        "in_flight_updates",
        "order",
        "window",
        "max_groups",
        "straggler_s",
    },
    "weights": {"transport"},
}


class Moment(Struct, frozen=True, kw_only=True):
    """An optimizer step.

    Attributes:
        seconds: of the RL loop until its end.
        reward: mean over the step's completions.
        kl: to the reference, nats per completion; None if the run does not measure it.
    """

    step: int
    seconds: float
    reward: float
    kl: float | None


class ComparedRun(Struct, frozen=True, kw_only=True):
    """A completed run.

    Attributes:
        samples: completions that were generated.
        wall_s: of the RL loop; in it a side was at work for `generate_s` or `train_s`, and generators stood still for
            weights for `push_s`.
        before, after: held-out reward of the policy it began with and of the trained one; None if nothing was held out.
        win_rate: held-out prompts that the trained policy answers with a higher reward than the one before, ties half.
        course: its optimizer steps.
    """

    directory: Path
    config: RunConfig
    schedule: Schedule
    steps: int
    samples: int
    startup_s: float
    wall_s: float
    generate_s: float
    train_s: float
    push_s: float
    before: float | None
    after: float | None
    win_rate: float | None
    course: list[Moment]

    @property
    def seed(self) -> int:
        return self.config.run.seed

    @property
    def overlap(self) -> float:
        """The slower side's work over the wall clock: 1 means that it never waited."""
        return max(self.generate_s, self.train_s) / self.wall_s

    def reward_at(self, seconds: float) -> float:
        """Mean reward of training over the window of steps before this time of the RL loop; of the first one before any."""
        return self.reward_after(max(1, sum(moment.seconds <= seconds for moment in self.course)))

    def reward_after(self, steps: int) -> float:
        """The same after so many steps, at least 1; of what there is, where that is less than the window."""
        return fmean(moment.reward for moment in self.course[:steps][-self._window :])

    @property
    def reward_at_end(self) -> float:
        return self.reward_at(math.inf)

    @property
    def kl_at_end(self) -> float | None:
        known = [moment.kl for moment in self.course[-self._window :] if moment.kl is not None]
        return fmean(known) if known else None

    @property
    def _window(self) -> int:
        return max(1, math.ceil(WINDOW * len(self.course)))


def read_run(directory: Path) -> ComparedRun:
    """
    Raises:
        ConfigError: there is no completed RL run, or one of a version that did not record what is needed.
    """
    check_is_run(directory)
    try:
        summary = read_figures(directory)
    except ValidationError:
        raise ConfigError(f"{directory}: its summary.json is not that of a run that did RL") from None
    lines = read_steps(directory / METRICS)
    if summary.status != "completed" or not lines or not summary.wall_seconds:
        raise ConfigError(f"{directory}: its RL is not completed (status {summary.status}); finish it, or leave it out")
    config = load_config(directory / RESOLVED_CONFIG)
    return ComparedRun(
        directory=directory,
        config=config,
        schedule=schedule_of(config),
        steps=summary.steps,
        samples=summary.samples_generated - summary.samples_cancelled,
        startup_s=summary.startup_seconds,
        wall_s=summary.wall_seconds,
        generate_s=summary.generate_busy_seconds,
        train_s=summary.train_busy_seconds,
        push_s=summary.weight_sync.count * summary.weight_sync.generator_stall_seconds_mean,
        before=summary.eval.get("before", {}).get("reward"),
        after=summary.eval.get("after", {}).get("reward"),
        win_rate=_win_rate(directory),
        course=_course(directory, lines, summary.wall_seconds),
    )


def _course(directory: Path, lines: Sequence[dict[str, Any]], wall_s: float) -> list[Moment]:
    """Older versions recorded only the clock of each step: their loop ended with the last one, or a push later."""
    last = lines[-1]["time"]
    course = [
        Moment(
            step=line["step"],
            seconds=line.get("time/elapsed_s", wall_s - (last - line["time"])),
            reward=line["reward"],
            kl=line.get("kl_to_reference"),
        )
        for line in lines
    ]
    if any(b.seconds < a.seconds for a, b in pairwise(course)) or course[0].seconds < 0:
        raise ConfigError(
            f"{directory}: was resumed by a version that did not record time/elapsed_s, so that the time of its steps is "
            "not known; train it again"
        )
    return course


def _win_rate(directory: Path) -> float | None:
    rewards: dict[str, list[float]] = {"before": [], "after": []}
    for line in read_lines(directory / EVALUATIONS):
        if line["when"] in rewards:
            rewards[line["when"]].append(line["reward"])
    if not rewards["after"] or len(rewards["before"]) != len(rewards["after"]):
        return None
    return float(np.mean(wins(rewards["after"], rewards["before"])))


def check_alike(runs: Sequence[ComparedRun]) -> None:
    """That they are of one configuration, seeds and schedules aside.

    Raises:
        ConfigError: names the first keys that differ.
    """
    first = runs[0]
    for run in runs[1:]:
        keys = _differences(first.config, run.config)
        if keys:
            raise ConfigError(
                f"{run.directory} and {first.directory} are not of one configuration: {', '.join(keys)} differ, so that "
                "nothing could be said of the schedule; compare runs that differ in the schedule and the seed alone"
            )


def _differences(a: RunConfig, b: RunConfig) -> list[str]:
    ours, theirs = a.model_dump(mode="json"), b.model_dump(mode="json")
    found = []
    for section in ours:
        allowed: set[str] | None = _MAY_DIFFER.get(section, set())
        if allowed is None or ours[section] == theirs[section]:
            continue
        if not (isinstance(ours[section], dict) and isinstance(theirs[section], dict)):
            found.append(section)
            continue
        keys = sorted(ours[section].keys() | theirs[section].keys())
        found += [
            f"{section}.{key}"
            for key in keys
            if key not in allowed and ours[section].get(key) != theirs[section].get(key)
        ]
    return found
