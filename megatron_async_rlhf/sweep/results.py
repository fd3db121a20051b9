"""What the points of a sweep came to, read from their directories: `results.json`, and the means that are plotted.

summary.json, metrics.jsonl of each point ──> PointResult ──> Group: the same point with every seed
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from megatron_async_rlhf.config.sweep import SweepSection
from megatron_async_rlhf.launch.progress import progress_of
from megatron_async_rlhf.sweep.points import Labels, Point, Sweep, name_of
from megatron_async_rlhf.telemetry.files import METRICS, read_steps, replace_file, writing
from megatron_async_rlhf.telemetry.summary import read_summary

RESULTS = "results.json"
_Number = TypeVar("_Number", bound=float)
_END = 0.1  # the share of the steps that "at the end" means


class PointResult(Struct, frozen=True, kw_only=True):
    """One point. All but the first fields are None unless it is completed.

    Attributes:
        status: see `progress.Status`.
        reward_before, reward_after: held-out, of the policy all points start from and of the trained one.
        kl_to_reference: nats per completion, mean over the last tenth of the steps; None if the run did not measure it.
        staleness_mean, staleness_max: optimizer steps, as measured.
        loss_finite: every loss in metrics.jsonl.
        seconds: of the RL loop.
        startup_seconds: until it began.
    """

    name: str
    labels: Labels
    status: str
    error: str | None = None
    steps: int | None = None
    samples: int | None = None
    reward_before: float | None = None
    reward_after: float | None = None
    kl_to_reference: float | None = None
    staleness_mean: float | None = None
    staleness_max: int | None = None
    loss_finite: bool | None = None
    seconds: float | None = None
    startup_seconds: float | None = None


class Group(Struct, frozen=True, kw_only=True):
    """The completed points that differ in the seed only; rewards and KL of each, staleness as the worst of them.

    Attributes:
        line: labels on the axes that are neither seed nor staleness, as one name.
        staleness: labels on the staleness axes, as one name.
        points: how many there are to be, completed or not.
    """

    line: str
    staleness: str
    points: int
    rewards_before: list[float]
    rewards: list[float]
    kl: list[float]
    staleness_mean: float
    staleness_max: int
    seconds: float


def collect(sweep: Sweep) -> list[PointResult]:
    """A result for each point, in order."""
    return [_result(point) for point in sweep.points]


def write_results(sweep: Sweep, results: list[PointResult]) -> Path:
    """`results.json`: the points, the axes, and every version of every package that a completed point ran with."""
    versions: dict[str, list[str]] = {}
    for point, result in zip(sweep.points, results, strict=True):
        if result.status == "completed":
            for package, version in read_summary(point.config.run.path).get("versions", {}).items():
                if version not in versions.setdefault(package, []):
                    versions[package].append(version)
    content = {
        "axes": {axis: list(choices) for axis, choices in sweep.section.axes.items()},
        "versions": versions,
        "points": msgspec.to_builtins(results),
    }
    path = sweep.directory / RESULTS
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(content, indent=1) + "\n")
    return path


def grouped(section: SweepSection, results: list[PointResult]) -> list[Group]:
    """Means over seeds start here. In the order of the points; groups without a completed point are left out."""
    members: dict[tuple[str, str], list[PointResult]] = {}
    for result in results:
        line = name_of({axis: result.labels[axis] for axis in section.line_axes}, " ") or "all"
        staleness = name_of({axis: result.labels[axis] for axis in section.staleness_axes}, " ") or "-"
        members.setdefault((line, staleness), []).append(result)
    groups = []
    for (line, staleness), points in members.items():
        done = [point for point in points if point.status == "completed" and point.reward_after is not None]
        if done:
            groups.append(
                Group(
                    line=line,
                    staleness=staleness,
                    points=len(points),
                    rewards_before=_known(p.reward_before for p in done),
                    rewards=_known(p.reward_after for p in done),
                    kl=_known(p.kl_to_reference for p in done),
                    staleness_mean=fmean(_known(p.staleness_mean for p in done)),
                    staleness_max=max(_known(p.staleness_max for p in done)),
                    seconds=fmean(_known(p.seconds for p in done)),
                )
            )
    return groups


def pareto_front(groups: list[Group]) -> list[Group]:
    """Those that no other beats in reward at as little KL, by means over seeds; least KL first."""
    measured = [group for group in groups if group.kl]
    front: list[Group] = []
    for group in sorted(measured, key=lambda g: (fmean(g.kl), -fmean(g.rewards))):
        if not front or fmean(group.rewards) > fmean(front[-1].rewards):
            front.append(group)
    return front


def _known(figures: Iterable[_Number | None]) -> list[_Number]:
    return [figure for figure in figures if figure is not None]


def _result(point: Point) -> PointResult:
    progress = progress_of(point.config)
    facts: dict[str, Any] = {}
    if progress.status == "completed":
        summary = read_summary(point.config.run.path)
        lines = read_steps(point.config.run.path / METRICS)
        kl = [line["kl_to_reference"] for line in lines if line.get("kl_to_reference") is not None]
        losses = [line["loss"] for line in lines if line.get("loss") is not None]
        evaluations = summary["eval"]
        facts = {
            "steps": summary["steps"],
            "samples": summary["samples_generated"],
            "reward_before": evaluations.get("before", {}).get("reward"),
            "reward_after": evaluations.get("after", {}).get("reward"),
            "kl_to_reference": fmean(kl[-math.ceil(_END * len(kl)) :]) if kl else None,
            "staleness_mean": summary["staleness"]["mean"],
            "staleness_max": summary["staleness"]["max"],
            "loss_finite": all(math.isfinite(loss) for loss in losses),
            "seconds": summary["wall_seconds"],
            "startup_seconds": summary["startup_seconds"],
        }
    return PointResult(name=point.name, labels=point.labels, status=progress.status, error=progress.error, **facts)
