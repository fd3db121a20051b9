"""The `sweep` section: which configurations `async-rlhf sweep` makes of one, by axes that are combined with each other."""

import re
from typing import Any

from pydantic import Field, PositiveFloat, field_validator, model_validator

from megatron_async_rlhf.config.section import Section, shown

_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # a part of a run's name
_SEED_KEYS = {"run.seed"}
_STALENESS_KEYS = {"schedule.mode", "schedule.mini_batches", "schedule.epochs", "schedule.max_staleness"}
_OWN_KEYS = {"run.name", "run.dir", "sweep"}

Choices = dict[str, dict[str, Any]]  # label -> overrides


class SweepSection(Section):
    """Every choice of one axis with every choice of the others, but for what `skip` leaves out.

    An axis is a mapping of labels to overrides, `{ppo: {algorithm.type: ppo}, ...}`; or, short, a key with its values,
    `{schedule.mini_batches: [1, 2, 4]}`, whose labels are the values.
    """

    axes: dict[str, Choices] = Field(min_length=1)
    # Combinations to leave out: those that have, on every axis named, one of the labels given.
    skip: list[dict[str, list[str]]] = []
    point_timeout_s: PositiveFloat = 86400.0  # a point that takes longer is ended and counts as failed

    @field_validator("axes", mode="before")
    @classmethod
    def write_out_values(cls, axes: Any) -> Any:
        """`{key: [values]}` becomes `{value: {key: value}}`; labels that YAML takes for numbers become text."""
        if not isinstance(axes, dict):
            return axes
        return {str(name): _choices(str(name), choices) for name, choices in axes.items()}

    @field_validator("skip", mode="before")
    @classmethod
    def take_single_labels(cls, rules: Any) -> Any:
        """One label stands for a list of one."""
        if not isinstance(rules, list) or not all(isinstance(rule, dict) for rule in rules):
            return rules
        return [
            {
                name: [str(label) for label in (given if isinstance(given, list) else [given])]
                for name, given in r.items()
            }
            for r in rules
        ]

    @model_validator(mode="after")
    def check_axes(self) -> "SweepSection":
        for axis, choices in self.axes.items():
            if not choices:
                raise ValueError(f"sweep.axes.{axis} has no choices: give it at least one, or remove it")
            for label, overrides in choices.items():
                if not _LABEL.fullmatch(label):
                    raise ValueError(
                        f"sweep.axes.{axis}: {label!r} cannot be part of a run's name (letters, digits and ._- can); "
                        "write label: {key: value}"
                    )
                own = next((key for key in overrides if key in _OWN_KEYS or key.startswith("sweep.")), None)
                if own:
                    raise ValueError(f"sweep.axes.{axis}.{label} sets {own}, which the sweep sets itself; remove it")
        return self

    @model_validator(mode="after")
    def check_skip(self) -> "SweepSection":
        for rule in self.skip:
            self.check_labels("sweep.skip", rule)
        return self

    def check_labels(self, where: str, rule: dict[str, list[str]]) -> None:
        """Raises ValueError if `rule` is empty, or names an axis or a label there is none of."""
        if not rule:
            raise ValueError(f"{where}: an empty rule fits every combination; name axes and labels")
        for axis, labels in rule.items():
            if axis not in self.axes:
                raise ValueError(f"{where}: there is no axis {axis}, only {', '.join(self.axes)}")
            for label in labels:
                if label not in self.axes[axis]:
                    raise ValueError(f"{where}: the axis {axis} has no {label}, only {', '.join(self.axes[axis])}")

    @property
    def seed_axes(self) -> list[str]:
        """Repetitions: axes that change nothing but the seed."""
        return [axis for axis, choices in self.axes.items() if _keys(choices) == _SEED_KEYS]

    @property
    def staleness_axes(self) -> list[str]:
        """Axes that change nothing but how old samples get."""
        return [axis for axis, choices in self.axes.items() if _keys(choices) and _keys(choices) <= _STALENESS_KEYS]

    @property
    def line_axes(self) -> list[str]:
        """The others: each combination of theirs is a line in the plot."""
        return [axis for axis in self.axes if axis not in (*self.seed_axes, *self.staleness_axes)]


def _keys(choices: Choices) -> set[str]:
    return {key for overrides in choices.values() for key in overrides}


def _choices(axis: str, choices: Any) -> Any:
    if not isinstance(choices, dict):
        raise ValueError(f"axis {axis} = {shown(choices)}: must be {{label: {{key: value}}}} or {{key: [values]}}")
    lists = [key for key, values in choices.items() if isinstance(values, list)]
    if lists:
        if len(choices) > 1:
            raise ValueError(f"axis {axis}: {lists[0]} = [...] must be the axis' only key; an axis moves one")
        ((key, values),) = choices.items()
        if len({str(value) for value in values}) < len(values):
            raise ValueError(f"axis {axis}: {key} has a value twice")
        return {str(value): {str(key): value} for value in values}
    return {str(label): {} if overrides is None else overrides for label, overrides in choices.items()}
