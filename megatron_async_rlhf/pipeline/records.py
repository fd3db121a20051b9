"""What has become of a pipeline's stages: `pipeline.json`, and what their directories say."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from msgspec import Struct, convert, to_builtins

from megatron_async_rlhf.checkpoint.run_checkpoints import RunCheckpoints
from megatron_async_rlhf.launch.progress import progress_of
from megatron_async_rlhf.launch.recipe import Recipe, Stage
from megatron_async_rlhf.pipeline.figures import figures_of
from megatron_async_rlhf.telemetry.files import SUMMARY, replace_file, writing

PIPELINE = "pipeline.json"


class StageRecord(Struct, kw_only=True):
    """What pipeline.json says of a stage, beside its figures.

    Attributes:
        dir: its run's directory.
        seconds: that its commands took, of all starts.
        made_from: the stages whose directories it read, and which making of them.
        instead_of: the making that was in its directory when this one began. As long as it is there this one has made nothing.
    """

    status: str = "to do"
    dir: str = ""
    seconds: float = 0.0
    made_from: dict[str, str] = {}
    instead_of: str = ""


class Records:
    """Of one recipe, an earlier start's to begin with."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._by_stage = {stage.name: StageRecord() for stage in recipe.stages} | _read(recipe)

    def is_done(self, stage: Stage) -> bool:
        """It was completed with this configuration, from what the stages before it made last."""
        return progress_of(stage.config).status == "completed" and self._is_of_these(stage)

    def was_cut_off(self, stage: Stage) -> bool:
        """It was interrupted, or failed and has saved what it had by then, and what it read is still there."""
        status, directory = progress_of(stage.config).status, stage.config.run.path
        has_saved = status == "failed" and bool(RunCheckpoints(directory).versions())
        return (status == "interrupted" or has_saved) and self._is_of_these(stage)

    def begin(self, stage: Stage, *, continues: bool) -> StageRecord:
        """The record of a stage that is made now, or continues being made."""
        record = self._by_stage[stage.name]
        record.dir, record.made_from, record.status = str(stage.config.run.path), self._made_from(stage), "running"
        record.instead_of = "" if continues else _making(stage.config.run.path)
        self.write()
        return record

    def note_done(self, stage: Stage) -> None:
        """Record one that is done, whatever was known of it when its pipeline ended."""
        record = self._by_stage[stage.name]
        if record.status != "completed":
            record.status = "completed"
            self.write()

    def write(self) -> None:
        path = self._recipe.directory / PIPELINE
        stages = {
            stage.name: to_builtins(self._by_stage[stage.name]) | figures_of(stage) for stage in self._recipe.stages
        }
        whole = {"name": self._recipe.name, "status": _overall(self._by_stage.values()), **stages}
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, json.dumps(whole, indent=1) + "\n")

    def _is_of_these(self, stage: Stage) -> bool:
        record = self._by_stage[stage.name]
        is_earlier = record.instead_of and _making(stage.config.run.path) == record.instead_of
        return record.made_from == self._made_from(stage) and not is_earlier

    def _made_from(self, stage: Stage) -> dict[str, str]:
        return {name: _making(self._recipe.directory / name) for name in stage.needs}


def _overall(records: Iterable[StageRecord]) -> str:
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
