"""Weights & Biases.

A run that continues from a checkpoint continues in W&B too: its id is kept in the run directory. Its charts are over `step`,
the run's own; the warm start's steps end at 0. Rows, which W&B numbers itself, are in the order of the steps, with one
after each step for an evaluation. What W&B has of a step that is made again, it keeps; what it has not, because a crash
lost the last moments or because W&B is offline and looks at nothing, it is told again.
"""

import secrets
from pathlib import Path
from typing import Any

import wandb

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.config.telemetry import WandbKeys
from megatron_async_rlhf.telemetry.files import (
    METRICS,
    RESOLVED_CONFIG,
    SUMMARY,
    TRACE,
    WANDB_ID,
    WARM_START,
    read_lines,
    read_steps,
    writing,
)


class WandbSink:
    """See `Sink`."""

    def __init__(self, config: RunConfig, keys: WandbKeys, run_dir: Path) -> None:
        self._dir = run_dir
        self._warm_start = config.warm_start.steps
        self._run = wandb.init(
            project=keys.project,
            entity=keys.entity,
            mode=keys.mode,
            tags=keys.tags,
            name=config.run.name,
            id=_run_id(run_dir),
            resume="allow",
            dir=run_dir,
            config=config.model_dump(mode="json"),
        )
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        self._known = self._run.step
        for line in read_lines(run_dir / WARM_START):
            self.warm_start(line["step"], line)
        for line in read_steps(run_dir / METRICS):
            self.step(line["step"], line)

    def warm_start(self, step: int, values: dict[str, Any]) -> None:
        named = {f"warm_start/{name}": value for name, value in values.items()}
        self._log(step, {"step": step - self._warm_start, **named})

    def step(self, step: int, values: dict[str, Any]) -> None:
        self._log(self._row(step), {"step": step, **values})

    def evaluation(self, version: int, steps: int, values: dict[str, Any]) -> None:
        self._log(self._row(steps) + 1, {"step": version, **values})

    def _row(self, step: int) -> int:
        return self._warm_start + 2 * step

    def _log(self, row: int, values: dict[str, Any]) -> None:
        if row >= self._known:
            self._run.log(values, step=row)

    def close(self, summary: dict[str, Any], *, failed: bool) -> None:
        """Also uploads the run's configuration, metrics, summary and trace as an artifact."""
        self._run.summary.update(summary)
        artifact = wandb.Artifact(f"run-{self._run.id}", type="run")
        for name in (RESOLVED_CONFIG, METRICS, SUMMARY, TRACE):
            if (self._dir / name).exists():
                artifact.add_file(str(self._dir / name))
        self._run.log_artifact(artifact)
        self._run.finish(exit_code=int(failed))


def _run_id(run_dir: Path) -> str:
    path = run_dir / WANDB_ID
    if not path.exists():
        with writing(path):
            path.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
