"""TensorBoard: event files in the run directory, `tensorboard --logdir runs` shows all runs."""

from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from megatron_async_rlhf.telemetry.files import METRICS, TENSORBOARD_DIR, read_steps
from megatron_async_rlhf.telemetry.sinks.sink import numbers


class TensorBoardSink:
    """See `Sink`. Curves are over the run's steps; the warm start's own, under `warm_start/`, end at 0."""

    def __init__(self, run_dir: Path, *, warm_start: int) -> None:
        self._warm_start = warm_start
        made = len(read_steps(run_dir / METRICS))
        # What was written after the checkpoint that a run continues from is not shown any more.
        self._writer = SummaryWriter(str(run_dir / TENSORBOARD_DIR), purge_step=made + 1 if made else None)

    def warm_start(self, step: int, values: dict[str, Any]) -> None:
        # Of all curves TensorBoard leaves out what is beyond `purge_step`.
        self._write(step - self._warm_start, {f"warm_start/{name}": value for name, value in numbers(values).items()})

    def step(self, step: int, values: dict[str, Any]) -> None:
        self._write(step, numbers(values))

    def evaluation(self, version: int, steps: int, values: dict[str, Any]) -> None:
        self._write(version, numbers(values))

    def close(self, summary: dict[str, Any], *, failed: bool) -> None:
        self._writer.close()

    def _write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()
