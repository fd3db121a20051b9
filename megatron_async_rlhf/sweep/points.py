"""From one configuration with a `sweep` section to the runs it stands for, all checked before any of them starts.

    tree ──> warm start (`async-rlhf sft`), once ──> its export is every point's `model.hf`
        └──> axes combined, `skip` taken out ──> a whole configuration per point

A point is an ordinary run in `<run.dir>/<point name>`; nothing of the sweep is left in its configuration.
"""

import copy
import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from megatron_async_rlhf.config.load import check_tree, set_key
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.config.sweep import SweepSection
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.formats.hub_snapshot import with_local_models
from megatron_async_rlhf.launch.stages import start_from
from megatron_async_rlhf.telemetry.files import EXPORT_DIR

Labels = dict[str, str]  # axis -> label

# What the weights after the warm start follow from. (The layout they are computed in changes no more than roundings.)
_WARM_START_KEYS = ("model", "warm_start", "data")


class Point(Struct, frozen=True, kw_only=True):
    """One run of a sweep: where it lies on each axis, and its whole configuration."""

    name: str
    labels: Labels
    config: RunConfig


class Sweep(Struct, frozen=True, kw_only=True):
    """All runs of a sweep.

    Attributes:
        directory: of the sweep; every run is a directory in it.
        section: the axes.
        warm_start: the `sft` run that comes first; None if the points need none.
        points: seed by seed, so that a sweep cut short has something of everything.
    """

    directory: Path
    section: SweepSection
    warm_start: RunConfig | None
    points: list[Point]

    def only(self, rule: dict[str, list[str]]) -> list[Point]:
        """The points that have, on every axis named, one of the labels given; all, if none is named.

        Raises:
            ConfigError: no such axis or label, or no such point.
        """
        if not rule:
            return self.points
        try:
            self.section.check_labels("--only", rule)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        chosen = [point for point in self.points if _fits(point.labels, rule)]
        if not chosen:
            raise ConfigError(f"--only: sweep.skip leaves out every point with {_shown(rule)}")
        return chosen


def expand(tree: dict[str, Any], *, weights: bool = True) -> Sweep:
    """All runs that the sections in `tree` stand for.

    Args:
        weights: of models that are named as at the hub, also get these, and not only what describes them.

    Raises:
        ConfigError: a line for each problem of the configuration itself, or for each point that cannot run.
    """
    base = with_local_models(check_tree(tree), weights=weights)
    if base.sweep is None:
        raise ConfigError("sweep: missing; give the configuration a sweep section, as in examples/sweep.yaml")
    directory = base.run.path
    warm_start = None
    if base.warm_start.steps:
        warm_start = with_local_models(_warm_start(tree, base, directory), weights=weights)
    if warm_start is not None:
        _check_axes_leave_the_start_alone(base.sweep)
    points, problems = [], []
    for labels in _combinations(base.sweep):
        try:
            point = _point(tree, labels, base.sweep, directory, warm_start)
            points.append(replace(point, config=with_local_models(point.config, weights=weights)))
        except ConfigError as error:
            problems.append(f"{name_of(labels)}: {'; '.join(str(error).splitlines())}")
    if problems:
        raise ConfigError("\n".join(problems))
    if not points:
        raise ConfigError("sweep.skip leaves out every combination of sweep.axes")
    names = [point.name for point in points]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"sweep.axes: two points would be called {name}; give one another label")
    return Sweep(directory=directory, section=base.sweep, warm_start=warm_start, points=points)


def name_of(labels: Labels, separator: str = "-") -> str:
    """The labels in the order of the axes; one that is only a number says too little without its axis."""
    return separator.join(label if label[0].isalpha() else f"{axis}{label}" for axis, label in labels.items())


def _combinations(sweep: SweepSection) -> list[Labels]:
    slowest_first = [*sweep.seed_axes, *(axis for axis in sweep.axes if axis not in sweep.seed_axes)]
    found = []
    for chosen in itertools.product(*(sweep.axes[axis] for axis in slowest_first)):
        by_axis = dict(zip(slowest_first, chosen, strict=True))
        labels = {axis: by_axis[axis] for axis in sweep.axes}
        if not any(_fits(labels, rule) for rule in sweep.skip):
            found.append(labels)
    return found


def _fits(labels: Labels, rule: dict[str, list[str]]) -> bool:
    return all(labels[axis] in given for axis, given in rule.items())


def _point(
    tree: dict[str, Any], labels: Labels, sweep: SweepSection, directory: Path, warm_start: RunConfig | None
) -> Point:
    own = {section: copy.deepcopy(keys) for section, keys in tree.items() if section != "sweep"}
    if warm_start is not None:
        start_from(own, warm_start, warm_start.run.path / EXPORT_DIR)
    for axis, label in labels.items():
        for key, value in sweep.axes[axis][label].items():
            set_key(own, key, copy.deepcopy(value))
    name = name_of(labels)
    set_key(own, "run.name", name)
    set_key(own, "run.dir", str(directory / name))
    return Point(name=name, labels=labels, config=check_tree(own))


def _warm_start(tree: dict[str, Any], base: RunConfig, directory: Path) -> RunConfig:
    """Its directory's name changes with what it depends on, and with it every point that started from another one."""
    resolved = base.model_dump(mode="json")
    facts = [base.run.seed, base.learner.precision, *(resolved[key] for key in _WARM_START_KEYS)]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]
    own = {section: copy.deepcopy(keys) for section, keys in tree.items() if section not in ("sweep", "sft")}
    set_key(own, "run.name", "warm_start")
    set_key(own, "run.dir", str(directory / f"warm_start-{digest}"))
    return check_tree(own)


def _check_axes_leave_the_start_alone(sweep: SweepSection) -> None:
    for axis, choices in sweep.axes.items():
        for label, overrides in choices.items():
            for key in overrides:
                if key.split(".")[0] in ("model", "warm_start"):
                    raise ConfigError(
                        f"sweep.axes.{axis}.{label} sets {key}, but all points start from one warm-started policy; "
                        "set warm_start.steps = 0, and in the axis what each point needs"
                    )


def _shown(rule: dict[str, list[str]]) -> str:
    return ", ".join(f"{axis}={'|'.join(labels)}" for axis, labels in rule.items())
