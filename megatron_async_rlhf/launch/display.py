"""Progress of a run for a person: a live panel on a terminal, plain lines anywhere else."""

import contextlib
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from megatron_async_rlhf.telemetry.files import EXPORT_DIR
from megatron_async_rlhf.telemetry.summary import read_summary

_LINE_EVERY_S = 5.0  # plain warm-start lines: a log, not a film


class _PatientConsole(Console):
    """Standard output may be a file on a disk that is full, or a terminal that is gone: no reason to end a run."""

    def print(self, *objects: Any, **options: Any) -> None:
        with contextlib.suppress(OSError):
            super().print(*objects, **options)


class Display:
    """Shows the controller's events."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or _PatientConsole(stderr=False, highlight=False, soft_wrap=True)
        self._live: Live | None = None
        self._state: dict[str, str] = {"phase": "starting", "generators": "starting", "learner": "starting"}
        self._began = self._last_line = time.monotonic()
        if self._console.is_terminal and self._console.file.isatty():  # FORCE_COLOR makes a log look like a terminal
            self._live = Live(self._panel(), console=self._console, refresh_per_second=4, transient=True)
            self._live.start()

    def show(self, event: dict[str, Any]) -> None:
        """One event of the controller."""
        match event:
            case {"event": "phase", "name": name}:
                self._state["phase"] = name
                self.note(f"{name}")
            case {"event": "note", "text": text}:
                self.note(text)
            case {"event": "activity", "side": side, "what": what}:
                self._state[side] = what
            case {"event": "warm_start", "step": step, "steps": steps, "loss": loss}:
                self._state["phase"] = f"warm start {step}/{steps}"
                self._state["learner"] = f"supervised loss {loss:.3f}"
                if step == steps or time.monotonic() - self._last_line > _LINE_EVERY_S:
                    self._plain(f"warm start {step}/{steps}  loss {loss:.3f}")
            case {"event": "supervised_step", "step": step, "steps": steps, "loss": loss}:
                self._state["phase"] = f"step {step}/{steps}"
                self._state["learner"] = f"loss {loss:.3f}"
                if step == steps or time.monotonic() - self._last_line > _LINE_EVERY_S:
                    self._plain(f"step {step}/{steps}  loss {loss:.3f}")
            case {"event": "step"}:
                self._state["phase"] = f"step {event['step']}/{event['steps']}"
                self._state["last step"] = _step_line(event)
                self._plain(f"step {event['step']}/{event['steps']}  {_step_line(event)}")
            case {"event": "checkpoint", "version": version}:
                self.note(f"checkpoint of step {version} is complete")
            case {"event": "evaluated", "when": when, "metrics": metrics}:
                self.note(f"held-out {when}: " + "  ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
        if self._live:
            self._live.update(self._panel())

    def note(self, text: str) -> None:
        """A line that stays, on a terminal too."""
        self._console.print(f"[{time.monotonic() - self._began:7.1f} s] {text}", markup=False)
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

    def _panel(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for name, value in self._state.items():
            table.add_row(name, value)
        table.add_row("elapsed", f"{time.monotonic() - self._began:.0f} s")
        return table


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


def _step_line(event: dict[str, Any]) -> str:
    parts = [f"reward {event['reward']:.3f}"]
    for name, label in (("loss", "loss"), ("kl", "KL")):
        if event.get(name) is not None:
            parts.append(f"{label} {event[name]:.3f}")
    return "  ".join([*parts, f"staleness {event['staleness']:.2f}", f"{event['samples_per_s']:.1f} samples/s"])
