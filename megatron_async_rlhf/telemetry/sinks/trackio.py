"""Trackio: a local dashboard, `trackio show`, or one in a Hugging Face Space."""

from pathlib import Path
from typing import Any

import trackio

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.config.telemetry import TrackioKeys
from megatron_async_rlhf.telemetry.files import METRICS, read_steps
from megatron_async_rlhf.telemetry.sinks.sink import numbers


class TrackioSink:
    """See `Sink`. The warm start's steps end at 0, as in W&B. A step that is made again is there twice."""

    def __init__(self, config: RunConfig, keys: TrackioKeys, run_dir: Path) -> None:
        self._warm_start = config.warm_start.steps
        goes_on = bool(read_steps(run_dir / METRICS))  # else it is another run, whatever its name
        trackio.init(
            project=keys.project,
            name=config.run.name,
            space_id=keys.space,
            config=config.model_dump(mode="json"),
            resume="allow" if goes_on else "never",
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )

    def warm_start(self, step: int, values: dict[str, Any]) -> None:
        named = {f"warm_start/{name}": value for name, value in numbers(values).items()}
        trackio.log(named, step=step - self._warm_start)

    def step(self, step: int, values: dict[str, Any]) -> None:
        trackio.log(numbers(values), step=step)

    def evaluation(self, version: int, steps: int, values: dict[str, Any]) -> None:
        trackio.log(numbers(values), step=version)

    def close(self, summary: dict[str, Any], *, failed: bool) -> None:
        trackio.finish()
