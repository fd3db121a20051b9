"""Weights & Biases, only if `telemetry.wandb` is set; imported only then."""

from pathlib import Path
from typing import Any

from megatron_async_rlhf.config.root import RunConfig


class WandbLog:
    """Forwards metrics; does nothing when W&B is off."""

    def __init__(self, config: RunConfig, run_dir: Path) -> None:
        self._run = None
        keys = config.telemetry.wandb
        if keys is None:
            return
        import wandb

        self._run = wandb.init(
            project=keys.project,
            entity=keys.entity,
            mode=keys.mode,
            tags=keys.tags,
            name=config.run.name,
            dir=run_dir,
            config=config.model_dump(mode="json"),
        )

    def log(self, values: dict[str, Any]) -> None:
        if self._run is not None:
            self._run.log(values)

    def close(self, summary: dict[str, Any], *, failed: bool) -> None:
        if self._run is not None:
            self._run.summary.update(summary)
            self._run.finish(exit_code=int(failed))
            self._run = None
