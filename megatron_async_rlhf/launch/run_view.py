"""What a run is doing, from its events, as some lines that fit 80 columns. Both the run's own terminal and `watch` show them."""

from collections import deque
from collections.abc import Callable
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table

_TREND = "▁▂▃▄▅▆▇█"
_TREND_STEPS = 24  # columns of the trend: the last steps
_PACE_STEPS = 20  # the time left is as long as these took
_WIDEST = 100


class RunView:
    """The state of one run. Events carry no times, so that they are taken as they come: `now` is theirs."""

    def __init__(self, memory: Callable[[], int | None] = lambda: None, *, unicode: bool = True) -> None:
        """
        Args:
            memory: bytes that the run's processes on this machine hold; None if that is not known.
            unicode: the terminal can show more than ASCII.
        """
        self._memory, self._unicode = memory, unicode
        self._began: float | None = None
        self._phase = "starting"
        self._sides = {"learner": "starting", "generators": "starting"}
        self._done, self._of = 0, 0
        self._paces: deque[tuple[float, int]] = deque(maxlen=_PACE_STEPS + 1)
        self._rewards: deque[float] = deque(maxlen=_TREND_STEPS)
        self._figures: dict[str, str] = {}

    def take(self, event: dict[str, Any], now: float) -> None:
        """One event of the controller."""
        self._began = now if self._began is None else self._began
        match event:
            case {"event": "phase", "name": name}:
                self._phase = name
                self._done, self._of = 0, event.get("steps", 0)
                self._paces.clear()
            case {"event": "activity", "side": side, "what": what}:
                self._sides[side] = what
            case {"event": "warm_start" | "supervised_step", "step": step, "steps": steps, "loss": loss}:
                self._advance(step, steps, now)
                self._figures["loss"] = f"{loss:.3f}"
                self._sides["learner"] = f"step {step}"
            case {"event": "step", "step": step, "steps": steps}:
                self._advance(step, steps, now)
                self._rewards.append(event["reward"])
                self._figures |= figures(event)

    def lines(self, now: float, width: int) -> RenderableType:
        """
        Args:
            width: columns of the terminal; no line is wider.
        """
        width = min(width, _WIDEST)
        head = Table.grid(expand=True, padding=(0, 1))
        head.width = width
        head.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
        head.add_column(no_wrap=True, justify="right")
        head.add_row(self._place(), self._clock(now))
        rows: list[RenderableType] = [head]
        if self._of:
            bar = Table.grid()
            bar.add_row(ProgressBar(total=self._of, completed=self._done, width=width))
            rows.append(bar)
        grid = Table.grid(padding=(0, 2))
        grid.width = width
        grid.add_column(no_wrap=True)
        grid.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
        for name, value in self._rows():
            grid.add_row(name, value)
        return Group(*rows, grid)

    def _advance(self, step: int, steps: int, now: float) -> None:
        self._done, self._of = step, steps
        self._paces.append((now, step))

    def _place(self) -> str:
        return f"{self._phase}, step {self._done} of {self._of}" if self._of else self._phase

    def _clock(self, now: float) -> str:
        elapsed = f"{duration(now - self._began)} so far" if self._began is not None else ""
        left = self._left(now)
        return elapsed if left is None else f"{elapsed}, {duration(left)} left"

    def _left(self, now: float) -> float | None:
        """Seconds until the last step, as far as the last ones tell."""
        if len(self._paces) < 2 or self._done >= self._of:
            return None
        (first, begun), (last, done) = self._paces[0], self._paces[-1]
        ahead = (self._of - self._done) * (last - first) / max(1, done - begun)
        return max(0.0, ahead - (now - last))

    def _rows(self) -> list[tuple[str, str]]:
        rows = []
        if self._rewards:
            rows.append(("reward", f"{self._figures['reward']}  {self._trend()}".rstrip()))
        others = [f"{name} {value}" for name, value in self._figures.items() if name not in ("reward", *_OF_SAMPLING)]
        sampling = [f"{name} {value}" for name, value in self._figures.items() if name in _OF_SAMPLING]
        for name, parts in (("training", others), ("sampling", sampling)):
            if parts:
                rows.append((name, "  ".join(parts)))
        rows += self._sides.items()
        if (memory := self._memory()) is not None:
            rows.append(("memory", f"{memory / 2**30:.1f} GiB here"))
        return rows

    def _trend(self) -> str:
        if not self._unicode or len(self._rewards) < 2:
            return ""
        low, high = min(self._rewards), max(self._rewards)
        scale = (len(_TREND) - 1) / (high - low) if high > low else 0.0
        return "".join(_TREND[round((reward - low) * scale)] for reward in self._rewards)


_OF_SAMPLING = ("staleness", "samples/s")


def figures(step: dict[str, Any]) -> dict[str, str]:
    """Of the event of an optimizer step."""
    found = {"reward": f"{step['reward']:.3f}"}
    for name, label in (("loss", "loss"), ("kl", "KL")):
        if step.get(name) is not None:
            found[label] = f"{step[name]:.3f}"
    return found | {"staleness": f"{step['staleness']:.2f}", "samples/s": f"{step['samples_per_s']:.1f}"}


def duration(seconds: float) -> str:
    """In words, to the second."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
