"""Runs the stages of a recipe, each as a command of `async-rlhf` in a process of its own.

stage ─> stage ─> ... ─> pipeline.json, written anew after each
  └── what is done is skipped, what was cut off continues, and what read from a stage that was done again is done again
"""

import time
from collections.abc import Callable, Sequence

from megatron_async_rlhf.launch.child_command import EXIT_COMPLETED, EXIT_INTERRUPTED, OWN_COMMAND, Commands
from megatron_async_rlhf.launch.recipe import RESUMABLE, Recipe, Stage
from megatron_async_rlhf.pipeline.models_here import with_models_here
from megatron_async_rlhf.pipeline.records import Records

_STATUS = {EXIT_COMPLETED: "completed", EXIT_INTERRUPTED: "interrupted"}


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
        self._commands = Commands(recipe.directory, note=note, command=command, watch=watch, heeds_stop=True)
        self._records = Records(recipe)

    def run(self) -> int:
        """The exit code: 0 all stages are completed, 1 one failed, 130 it was interrupted."""
        stages = self._recipe.stages
        with self._commands:
            for number, stage in enumerate(map(with_models_here, stages), start=1):
                if self._records.is_done(stage):
                    self._records.note_done(stage)
                    self._note(f"[{number}/{len(stages)}] {stage.name}: is done")
                    continue
                self._note(f"[{number}/{len(stages)}] {stage.name}: async-rlhf {stage.command}")
                code = self._make(stage)
                if code != EXIT_COMPLETED:
                    self._note(f"{len(stages) - number} stages after {stage.name} are left to do")
                    return code
                if self._commands.is_interrupted and number < len(stages):
                    self._note(f"{len(stages) - number} stages are left to do: the same command continues with them")
                    return EXIT_INTERRUPTED
        return EXIT_COMPLETED

    def _make(self, stage: Stage) -> int:
        continues = stage.command in RESUMABLE and self._records.was_cut_off(stage)
        record, began = self._records.begin(stage, continues=continues), time.monotonic()
        code = self._commands.run(stage.command, stage.name, stage.config, resume=continues)
        record.seconds = round(time.monotonic() - began + (record.seconds if continues else 0.0), 1)
        record.status = _STATUS.get(code, "failed")
        self._records.write()
        return code
