"""The runs of a comparison are the points of a sweep with two axes, the schedule and the seed: made, resumed and skipped alike."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_async_rlhf.compare.runs import ComparedRun, read_run
from megatron_async_rlhf.compare.schedules import BASELINES, Schedule, settings_of
from megatron_async_rlhf.config.load import check_tree, read_tree, set_key
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.launch.progress import progress_of
from megatron_async_rlhf.launch.surroundings import check_surroundings
from megatron_async_rlhf.launch.terminal import outlive_readers
from megatron_async_rlhf.options import warn
from megatron_async_rlhf.sweep.driver import Driver, check_directory
from megatron_async_rlhf.sweep.inputs import check_inputs_of_earlier_points
from megatron_async_rlhf.sweep.points import Sweep, expand
from megatron_async_rlhf.sweep.preflight import check_points


def planned_runs(
    sources: Sequence[Path], overrides: list[str], seeds: str, baselines: Sequence[str], *, weights: bool
) -> Sweep:
    """All runs, in the directory of the configuration's run with `-compare` after its name; none of them checked against data.

    Args:
        baselines: none stands for all of them that the configuration allows.
        weights: get those of models that are named as at the hub.

    Raises:
        ConfigError: of what the command line asks for, or of the configuration.
    """
    if len(sources) != 1 or sources[0].is_dir():
        raise ConfigError(
            f"{' '.join(map(str, sources))}: give one configuration, or directories of completed runs, not both"
        )
    tree = read_tree(sources[0], overrides)
    if "sweep" in tree:
        raise ConfigError("compare: the configuration has a sweep section; take it out, or use async-rlhf sweep")
    base = check_tree(tree)
    schedules = {"async": settings_of("async", base)} | _baselines(base, baselines)
    axes: dict[str, Any] = {"schedule": schedules, "seed": {"run.seed": _numbers(seeds)}}
    if base.run.dir is None:
        set_key(tree, "run.name", f"{base.run.name}-compare")
    return expand(tree | {"sweep": {"axes": axes}}, weights=weights)


def check_runs(plan: Sweep) -> None:
    """Against model and data, before any of them starts.

    Raises:
        ConfigError: one cannot run.
    """
    check_directory(plan.directory)
    check_points(plan, plan.points)
    check_inputs_of_earlier_points(plan)


def make_runs(plan: Sweep, console: Console) -> int:
    """Those that are not completed; exit code as of `sweep`."""
    warn(check_surroundings())
    outlive_readers()
    driver = Driver(plan, note=lambda line: console.print(line, markup=False), after_point=lambda: None)
    return driver.run(plan.points, max_seconds=None)


def completed_runs(plan: Sweep) -> list[ComparedRun]:
    """What there is of them."""
    configs = [point.config for point in plan.points]
    return [read_run(config.run.path) for config in configs if progress_of(config).status == "completed"]


def _baselines(base: RunConfig, asked: Sequence[str]) -> dict[str, dict[str, Any]]:
    for name in asked:
        if name not in BASELINES:
            raise ConfigError(f"--baseline {name}: must be {' or '.join(BASELINES)}")
    if asked:
        return {name: settings_of(_baseline(name), base) for name in dict.fromkeys(asked)}
    found: dict[str, dict[str, Any]] = {}
    problems = []
    for name in BASELINES:
        try:
            found[name] = settings_of(name, base)
        except ConfigError as error:
            problems.append(str(error))
    if not found:
        raise ConfigError("; ".join(problems))
    warn(problems)
    return found


def _baseline(name: str) -> Schedule:
    return next(baseline for baseline in BASELINES if baseline == name)


def _numbers(seeds: str) -> list[int]:
    try:
        numbers = [int(seed) for seed in seeds.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 0 or len({*numbers}) < len(numbers):
        raise ConfigError(f"--seeds {seeds}: must be different whole numbers, such as 0,1,2")
    return numbers
