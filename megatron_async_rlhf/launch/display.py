"""Progress of a run for a person: a live panel on a terminal, plain lines anywhere else."""

import contextlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live

from megatron_async_rlhf.config.section import written
from megatron_async_rlhf.launch.run_view import RunView, figures
from megatron_async_rlhf.telemetry.files import EXPORT_DIR
from megatron_async_rlhf.telemetry.summary import read_summary

_LINE_EVERY_S = 5.0  # plain warm-start lines: a log, not a film
_REFRESH_PER_S = 2


class _PatientConsole(Console):
    """Standard output may be a file on a disk that is full, or a terminal that is gone: no reason to end a run."""

    def print(self, *objects: Any, **options: Any) -> None:
        with contextlib.suppress(OSError):
            super().print(*objects, **options)


class Display:
    """Shows the controller's events."""

    def __init__(
        self,
        console: Console | None = None,
        memory: Callable[[], int | None] = lambda: None,
        began: float | None = None,
    ) -> None:
        """
        Args:
            memory: bytes that the run's processes on this machine hold, asked whenever the panel is drawn.
            began: when the run did, on the clock of `time.monotonic`; default: now.
        """
        # On a terminal long lines break between words; elsewhere each stays one line.
        self._console = console or _PatientConsole(highlight=False, soft_wrap=not sys.stdout.isatty())
        self._live: Live | None = None
        self._view = RunView(memory, unicode=self._console.encoding.lower().startswith("utf"))
        self._last_line = time.monotonic()
        self._began = self._last_line if began is None else began
        self._now: float | None = None  # of the event that is shown, if it is told later than it happened
        # FORCE_COLOR makes a log look like a terminal; a dumb one cannot move its cursor.
        if self._console.is_terminal and self._console.file.isatty() and not self._console.is_dumb_terminal:
            panel = LivePanel(self._view)
            self._live = Live(panel, console=self._console, refresh_per_second=_REFRESH_PER_S, transient=True)
            self._live.start()

    def chosen(self, keys: dict[str, Any]) -> None:
        """What of the configuration is not at its default, for whoever reads the log later."""
        told = ", ".join(f"{key}={written(value)}" for key, value in keys.items())
        self._console.print(f"not at their defaults: {told}", markup=False)

    def show(self, event: dict[str, Any], now: float | None = None) -> None:
        """One event of the controller; `now`, on the clock of `time.monotonic`, is when it happened."""
        self._now = now
        self._view.take(event, time.monotonic() if now is None else now)
        match event:
            case {"event": "phase", "name": name}:
                self.note(f"{name}")
            case {"event": "note", "text": text}:
                self.note(text)
            case {"event": "warm_start", "step": step, "steps": steps, "loss": loss}:
                if step == steps or time.monotonic() - self._last_line > _LINE_EVERY_S:
                    self._plain(f"warm start {step}/{steps}  loss {loss:.3f}")
            case {"event": "supervised_step", "step": step, "steps": steps, "loss": loss}:
                if step == steps or time.monotonic() - self._last_line > _LINE_EVERY_S:
                    self._plain(f"step {step}/{steps}  loss {loss:.3f}")
            case {"event": "step"}:
                self._plain(f"step {event['step']}/{event['steps']}  {_told(figures(event))}")
            case {"event": "checkpoint", "version": version}:
                self.note(f"checkpoint of step {version} is complete")
            case {"event": "evaluated", "when": when, "metrics": metrics}:
                self.note(f"held-out {when}: " + "  ".join(f"{name} {value:.4g}" for name, value in metrics.items()))

    def note(self, text: str) -> None:
        """A line that stays, on a terminal too."""
        now = time.monotonic() if self._now is None else self._now
        self._console.print(f"[{now - self._began:7.1f} s] {text}", markup=False)
        self._last_line = time.monotonic()

    def finished(self, status: str, error: str | None, tail: list[str], run_dir: Path) -> None:
        """The last word: how the run ended and where it is."""
        if self._live:
            self._live.stop()
            self._live = None
        for line in tail:
            self._console.print(f"  | {line}", markup=False)
        if error:
            self.note(f"error: {error}")
        self.note(f"{status}: {run_dir}")
        for line in results(run_dir):
            self._console.print(f"  {line}", markup=False)

    def _plain(self, text: str) -> None:
        if self._live is None:
            self.note(text)


class LivePanel:
    """A `RunView` as it is when it is drawn, however wide the terminal is by then."""

    def __init__(self, view: RunView) -> None:
        self._view = view

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._view.lines(time.monotonic(), options.max_width)


def results(run_dir: Path) -> list[str]:
    """What a run came to, and where its policy is; nothing of one that has neither been evaluated nor exported."""
    evaluations = read_summary(run_dir).get("eval", {})
    before, after = evaluations.get("before", {}), evaluations.get("after", {})
    changes = [f"{name} {before[name]:.4g} -> {value:.4g}" for name, value in after.items() if _is_told(name, before)]
    lines = [f"held-out, before and after: {', '.join(changes)}"] if changes else []
    if any((run_dir / EXPORT_DIR).glob("*.safetensors")):
        lines.append(f"model, as a Hugging Face directory: {run_dir / EXPORT_DIR}")
    return lines


def _is_told(name: str, before: dict[str, float]) -> bool:
    same_as_reward = name == "reward_penalised" and before.get(name) == before.get("reward")
    return name in before and name != "logprob_gap" and not same_as_reward


def _told(figures: dict[str, str]) -> str:
    rate = figures.pop("samples/s")
    return "  ".join([*(f"{name} {value}" for name, value in figures.items()), f"{rate} samples/s"])
