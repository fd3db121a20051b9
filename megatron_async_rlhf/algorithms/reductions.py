"""How a metric's parts, one of each micro-batch of each rank, become one number.

A plain tensor is added up: a loss divides by the whole step's denominator itself. What cannot be added says so.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch

Reduction = Literal["sum", "mean", "max", "min"]


class Reduced(NamedTuple):
    """A micro-batch's part of a metric, and what is made of all parts. `mean`: each micro-batch counts the same."""

    value: torch.Tensor
    how: Reduction


Metrics = dict[str, torch.Tensor | Reduced]
# Under `max` and `min`, of whoever has no part.
_NOTHING = {"sum": 0.0, "mean": 0.0, "max": -torch.inf, "min": torch.inf}
_JOIN = {"sum": torch.add, "mean": torch.add, "max": torch.maximum, "min": torch.minimum}


def largest(values: torch.Tensor, mask: torch.Tensor) -> Reduced:
    """The metric that is the largest of the values where the mask is True, of any shape; 0 where it nowhere is."""
    return Reduced(values.detach().where(mask, 0).max(), "max")


def reductions(report: Mapping[str, torch.Tensor | Reduced]) -> dict[str, Reduction]:
    """By name, in alphabetical order."""
    return {name: part.how if isinstance(part := report[name], Reduced) else "sum" for name in sorted(report)}


def joined(
    reports: Sequence[Mapping[str, torch.Tensor | Reduced]], names: Sequence[str], how: Reduction
) -> torch.Tensor:
    """The parts of several micro-batches as one part, float64 [names] on the host."""
    total = torch.full((len(names),), _NOTHING[how], dtype=torch.float64)
    for report in reports:
        parts = [report[name] for name in names]
        values = [part.value if isinstance(part, Reduced) else part for part in parts]
        total = _JOIN[how](total, torch.stack([value.detach().double().cpu() for value in values]))
    return total
