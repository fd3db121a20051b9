"""Where a learner rank's time goes: spans for the timeline, and seconds and rates of a step for the metrics."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron_async_rlhf.clock import now
from megatron_async_rlhf.types import Span

# The metrics of an optimizer step and the spans each sums; the reduction is part of forward-backward.
_STEP_METRICS = {
    "time/reference_s": ("reference",),
    "time/proximal_s": ("proximal",),
    "time/values_s": ("values",),
    "time/forward_backward_s": ("forward-backward",),
    "time/gradient_reduction_s": ("gradient reduction",),
    "time/optimizer_s": ("gradient norm", "optimizer"),
}
_PART_OF_ANOTHER = "time/gradient_reduction_s"
_ONLY_IF_MADE = ("time/proximal_s", "time/values_s")


class Meter:
    """Collects one rank's timing spans until `take` returns them."""

    def __init__(self, process: str, synchronize: Callable[[], None]) -> None:
        """`synchronize` waits for a device that works asynchronously, so that a span ends when its work does."""
        self._process = process
        self._synchronize = synchronize
        self._spans: list[Span] = []
        self._args: dict[str, int | float] = {}

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Time what happens inside."""
        start = now()
        yield
        self._synchronize()
        self.add(Span(name=name, start=start, end=now(), process=self._process, lane="train", args=self._args))

    @contextmanager
    def about(self, **args: int | float) -> Iterator[None]:
        """The spans inside get these arguments."""
        self._args = args
        try:
            yield
        finally:
            self._args = {}

    def add(self, span: Span) -> None:
        """A span measured elsewhere."""
        self._spans.append(span)

    def take(self) -> list[Span]:
        """All spans since the last call."""
        spans, self._spans = self._spans, []
        return spans

    def step_metrics(
        self, tokens: float, flops: float, peak_flops: float | None, *, steps: int = 1
    ) -> dict[str, float]:
        """Seconds, `tokens_per_s` and, if the peak is known, `model_flops_utilisation` of the steps since `take`.

        Rates are over the time the learner works; waiting for a weight push is not counted.

        Args:
            tokens: of the steps, on all ranks.
            flops: model FLOPs of the steps, on all ranks.
            peak_flops: that all ranks' devices together could do in a second.
            steps: optimizer steps; each gets as large a share of the seconds, whichever of them a pass was for.
        """
        seconds = {
            metric: sum(span.end - span.start for span in self._spans if span.name in names)
            for metric, names in _STEP_METRICS.items()
        }
        working = sum(value for metric, value in seconds.items() if metric != _PART_OF_ANOTHER)
        rates = {"tokens_per_s": tokens / working}
        if peak_flops is not None:
            rates["model_flops_utilisation"] = flops / (working * peak_flops)
        made = {m: value / steps for m, value in seconds.items() if value or m not in _ONLY_IF_MADE}
        return made | rates
