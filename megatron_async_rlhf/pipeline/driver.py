"""Runs the stages of a recipe, each as a command of `async-rlhf` in a process of its own.

stage ─> stage ─> ... ─> pipeline.json, written anew after each
  └── what is done is skipped, what was cut off goes on, and what read from a stage that was done again is done again
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct, convert, to_builtins

from megatron_async_rlhf.launch.child_command import EXIT_COMPLETED, EXIT_INTERRUPTED, OWN_COMMAND, Commands
from megatron_async_rlhf.launch.progress import progress_of
from megatron_async_rlhf.launch.recipe import RESUMABLE, Recipe, Stage
from megatron_async_rlhf.pipeline.figures import figures_of
from megatron_async_rlhf.telemetry.files import SUMMARY, replace_file, writing

PIPELINE = "pipeline.json"
_STATUS = {EXIT_COMPLETED: "completed", EXIT_INTERRUPTED: "interrupted"}


class StageRecord(Struct, kw_only=True):
    """What pipeline.json says of a stage, beside its figures.

    Attributes:
        dir: its run's directory.
        seconds: that its commands took, of all starts.
        made_from: the stages whose directories it read, and which making of them.
    """

    status: str = "to do"
    dir: str = ""
    seconds: float = 0.0
    made_from: dict[str, str] = {}


class Driver:
    """One start of a pipeline."""

    def __init__(
        self,
        recipe: Recipe,
        *,
        note: Callable[[str], None],
        command: Sequence[str] = OWN_COMMAND,
        watch: Callable[[str], None] | None = None,
    ) -> None:
        """
        Args:
            note: takes a line for who watches.
            command: what stands for `async-rlhf`.
            watch: takes the last line of the stage under way, again and again.
        """
        self._recipe, self._note = recipe, note
        self._commands = Commands(recipe.directory, note=note, command=command, watch=watch)
        self._records = {stage.name: StageRecord() for stage in recipe.stages} | _read(recipe)

    def run(self) -> int:
        """The exit code: 0 all stages are completed, 1 one failed, 130 it was interrupted."""
        stages = self._recipe.stages
        with self._commands:
            for number, stage in enumerate(stages, start=1):
                if self._is_done(stage):
                    self._note(f"[{number}/{len(stages)}] {stage.name}: is done")
                    continue
                self._note(f"[{number}/{len(stages)}] {stage.name}: async-rlhf {stage.command}")
                code = self._make(stage)
                if code != EXIT_COMPLETED:
                    self._note(f"{len(stages) - number} stages after {stage.name} are left to do")
                    return code
                if self._commands.is_interrupted and number < len(stages):
                    self._note(f"{len(stages) - number} stages are left to do: the same command goes on with them")
                    return EXIT_INTERRUPTED
        return EXIT_COMPLETED

    def _is_done(self, stage: Stage) -> bool:
        """It was completed with this configuration, from what the stages before it made last."""
        record = self._records[stage.name]
        return progress_of(stage.config).status == "completed" and record.made_from == self._made_from(stage)

    def _make(self, stage: Stage) -> int:
        record, source = self._records[stage.name], self._made_from(stage)
        was_cut_off = progress_of(stage.config).status == "interrupted" and record.made_from == source
        record.dir, record.made_from, record.status = str(stage.config.run.path), source, "running"
        self._write()
        began = time.monotonic()
        code = self._commands.run(
            stage.command, stage.name, stage.config, resume=was_cut_off and stage.command in RESUMABLE
        )
        record.seconds = round(time.monotonic() - began + (record.seconds if was_cut_off else 0.0), 1)
        record.status = _STATUS.get(code, "failed")
        self._write()
        return code

    def _made_from(self, stage: Stage) -> dict[str, str]:
        return {name: _making(self._recipe.directory / name) for name in stage.needs}

    def _write(self) -> None:
        path = self._recipe.directory / PIPELINE
        stages = {
            name: to_builtins(self._records[name]) | figures_of(stage)
            for name, stage in ((stage.name, stage) for stage in self._recipe.stages)
        }
        whole = {"name": self._recipe.name, "status": _overall(self._records.values()), **stages}
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, json.dumps(whole, indent=1) + "\n")


def _overall(records: Any) -> str:
    statuses = {record.status for record in records}
    return next((status for status in ("running", "failed", "interrupted", "to do") if status in statuses), "completed")


def _making(directory: Path) -> str:
    """Tells one making of a stage from another; empty if it was not made."""
    try:
        return hashlib.sha256((directory / SUMMARY).read_bytes()).hexdigest()[:16]
    except OSError:
        return ""


def _read(recipe: Recipe) -> dict[str, StageRecord]:
    """Of an earlier start; nothing of a file that is not ours, so that all is looked at anew."""
    try:
        whole = json.loads((recipe.directory / PIPELINE).read_text(encoding="utf-8"))
        return {stage.name: convert(whole[stage.name], StageRecord) for stage in recipe.stages if stage.name in whole}
    except (OSError, ValueError, TypeError):
        return {}
