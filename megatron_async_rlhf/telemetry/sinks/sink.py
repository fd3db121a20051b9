"""What every sink is told."""

from typing import Any, Protocol


class Sink(Protocol):
    """Values are those of `metrics.jsonl`; what is no number is left out by those that take numbers alone.

    A resumed run tells every step again that it makes again.
    """

    def warm_start(self, step: int, values: dict[str, Any]) -> None:
        """Of the `step`-th step of the warm start."""

    def step(self, step: int, values: dict[str, Any]) -> None:
        """Of the `step`-th optimizer step."""

    def evaluation(self, version: int, steps: int, values: dict[str, Any]) -> None:
        """Of a policy version, when `steps` steps had been made."""

    def close(self, summary: dict[str, Any], *, failed: bool) -> None:
        """The run has ended; `summary` is its `summary.json`."""


def numbers(values: dict[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name not in ("step", "time")
    }
