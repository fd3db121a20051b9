"""Runs as one HTML file."""

from collections.abc import Callable, Sequence
from typing import Any

from megatron_async_rlhf.config.metrics import possible_metrics
from megatron_async_rlhf.config.section import written
from megatron_async_rlhf.launch.run_view import duration
from megatron_async_rlhf.pages.rendering import packed, render
from megatron_async_rlhf.report.advice import advice_on, idle_shares, stalled_share
from megatron_async_rlhf.report.run import Column, ReportedRun
from megatron_async_rlhf.telemetry.summary import is_unfinished

_HELD_OUT = "held-out "  # before the names of metrics of evaluations
Rows = list[tuple[str, list[str]]]


def page(runs: Sequence[ReportedRun]) -> str:
    names = [run.name for run in runs]
    headline = _headline(runs)
    return render(
        "report/page.html.jinja",
        title=names[0] if len(runs) == 1 else f"{len(runs)} runs: {', '.join(names)}",
        runs=runs,
        names=names,
        headline=headline,
        headline_rows=[[label, *cells] for label, cells in headline],
        advice=[(run.name, advice) for run in runs for advice in advice_on(run)],
        staleness=[(run.name, rows) for run in runs if (rows := _staleness(run))],
        chosen=_chosen(runs),
        versions=[[package, *cells] for package, cells in _versions(runs)],
        directories=[[run.name, run.directory] for run in runs],
        notes=[note for run in runs for note in run.notes],
        data=packed({"runs": [_data(run) for run in runs], "meanings": _meanings()}),
    )


def _headline(runs: Sequence[ReportedRun]) -> Rows:
    rows = []
    for label, figure in _FIGURES.items():
        cells = [figure(run) for run in runs]
        if any(cells):
            rows.append((label, [cell or "–" for cell in cells]))
    return rows


def _outcome(run: ReportedRun) -> str:
    if is_unfinished(run.summary):
        return "running, or killed"
    return str(run.summary.get("status", "no summary"))


def _schedule(run: ReportedRun) -> str:
    if not run.summary.get("samples_generated"):
        return ""
    bound = run.config.schedule.staleness_bound
    how = "synchronous" if bound == 0 else f"at most {bound} steps off-policy" if bound else "no staleness bound"
    return f"{run.config.algorithm.type}, {how}"


def _steps(run: ReportedRun) -> str:
    return f"{len(next(iter(run.metrics.values()))):,} in {duration(run.summary.get('wall_seconds', 0.0))}"


def _held_out(run: ReportedRun) -> str:
    points = run.held_out.get("reward", [])
    if len(points) == 1:
        return f"{points[0][1]:.3g} at step {points[0][0]}"
    return " → ".join(f"{value:.3g}" for _, value in (points[0], points[-1])) if points else ""


def _waiting(run: ReportedRun) -> str:
    idle = idle_shares(run)
    return f"generators {idle[0]:.0%}, learner {idle[1]:.0%}" if idle else ""


def _overlap(run: ReportedRun) -> str:
    return f"{run.summary['overlap_efficiency']:.3f}" if idle_shares(run) else ""


def _samples_per_second(run: ReportedRun) -> str:
    return f"{run.summary['samples_generated'] / run.summary['wall_seconds']:.3g}" if idle_shares(run) else ""


def _pushes(run: ReportedRun) -> str:
    push = run.summary.get("weight_sync", {})
    if not push.get("count"):
        return ""
    return f"{push['verified']:,} of {push['count']:,} verified, {push['mismatches']} mismatches, {stalled_share(run):.1%} of the time"


def _gap(run: ReportedRun) -> str:
    gap = run.summary.get("logprob_gap", {})
    return f"{gap['mean_abs']:.2g} nats" if gap.get("tokens") else ""


def _age(run: ReportedRun) -> str:
    staleness = run.summary.get("staleness", {})
    return f"{staleness['mean']:.2f}, at most {staleness['max']}" if staleness.get("histogram") else ""


_FIGURES: dict[str, Callable[[ReportedRun], str]] = {
    "status": _outcome,
    "algorithm": _schedule,
    "steps": _steps,
    "held-out reward": _held_out,
    "waiting": _waiting,
    "overlap efficiency": _overlap,
    "samples per second": _samples_per_second,
    "staleness, steps": _age,
    "weight pushes": _pushes,
    "learner against sampler": _gap,
}


def _staleness(run: ReportedRun) -> list[tuple[str, float, int]]:
    """Age, share of the tokens, and their number."""
    histogram = run.summary.get("staleness", {}).get("histogram", {})
    tokens = sum(histogram.values())
    return [(age, count / tokens, count) for age, count in histogram.items()] if tokens else []


def _chosen(runs: Sequence[ReportedRun]) -> Rows:
    """What differs between runs first."""
    keys = dict.fromkeys(key for run in runs for key in run.chosen)
    rows = [(key, [written(run.chosen[key]) if key in run.chosen else "default" for run in runs]) for key in keys]
    return sorted(rows, key=lambda row: len(set(row[1])) == 1)


def _versions(runs: Sequence[ReportedRun]) -> Rows:
    versions = [run.summary.get("versions", {}) for run in runs]
    return [
        (package, [of.get(package, "–") for of in versions])
        for package in dict.fromkeys(p for of in versions for p in of)
    ]


def _data(run: ReportedRun) -> dict[str, Any]:
    """What the page's scripts draw."""
    steps = run.metrics["step"]
    seconds = run.metrics.get("time/elapsed_s") or _since_first(run.metrics["time"])
    curves: dict[str, dict[str, list]] = {
        metric: {"value": column}  # at the run's `steps`
        for metric, column in run.metrics.items()
        if metric not in ("step", "time")
    }
    for metric, points in run.held_out.items():
        curves[_HELD_OUT + metric] = {"step": [step for step, _ in points], "value": [value for _, value in points]}
    return {
        "name": run.name,
        "steps": steps,
        "seconds": seconds,
        "curves": curves,
        "timeline": run.timeline,
        "samples": run.samples,
    }


def _since_first(times: Column) -> Column:
    """Of a stage before RL, which has no loop whose time it records."""
    first = next(time for time in times if time is not None)
    return [None if time is None else time - first for time in times]


def _meanings() -> dict[str, tuple[str, str]]:
    """Unit and meaning of a metric, by name."""
    plain = {key.name: (key.unit, key.meaning.replace("`", "").replace("\\|", "|")) for key in possible_metrics()}
    return plain | {
        _HELD_OUT + name: (unit, f"{meaning}; of held-out prompts") for name, (unit, meaning) in plain.items()
    }
