"""The sinks that a configuration asks for. What each needs is imported only then."""

import sys
from importlib.util import find_spec
from pathlib import Path

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.config.telemetry import TelemetrySection
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.telemetry.sinks.sink import Sink


def check_sinks(telemetry: TelemetrySection) -> None:
    """
    Raises:
        ConfigError: one needs a package that is not installed; nothing was imported.
    """
    needed = {
        "wandb": ("wandb", telemetry.wandb is not None),
        "tensorboard": ("tensorboardX", telemetry.tensorboard),
        "trackio": ("trackio", telemetry.trackio is not None),
        "prometheus": ("prometheus_client", telemetry.prometheus is not None),
    }
    for key, (package, is_needed) in needed.items():
        if is_needed and find_spec(package) is None:
            raise ConfigError(
                f"telemetry.{key} needs {package}, which is not installed here, in {sys.prefix}: "
                f"{sys.executable} -m pip install {package.replace('_', '-')}"
            )


def open_sinks(config: RunConfig, run_dir: Path) -> list[Sink]:
    telemetry, sinks = config.telemetry, list[Sink]()
    if telemetry.wandb is not None:
        from megatron_async_rlhf.telemetry.sinks.wandb import WandbSink

        sinks.append(WandbSink(config, telemetry.wandb, run_dir))
    if telemetry.tensorboard:
        from megatron_async_rlhf.telemetry.sinks.tensorboard import TensorBoardSink

        sinks.append(TensorBoardSink(run_dir, warm_start=config.warm_start.steps))
    if telemetry.trackio is not None:
        from megatron_async_rlhf.telemetry.sinks.trackio import TrackioSink

        sinks.append(TrackioSink(config, telemetry.trackio, run_dir))
    if telemetry.prometheus is not None:
        from megatron_async_rlhf.telemetry.sinks.prometheus import PrometheusSink

        sinks.append(PrometheusSink(telemetry.prometheus, config.run.name))
    return sinks
