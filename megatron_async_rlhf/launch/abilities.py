"""Asks whether this machine can run a configuration on its GPUs, before anything is started."""

import subprocess
import sys
from pathlib import Path

from megatron_async_rlhf.errors import ConfigError

_TIMEOUT_S = 120.0  # imports torch and Megatron, and starts CUDA


def check_device(config: Path) -> None:
    """
    Args:
        config: a resolved configuration.

    Raises:
        ConfigError: a line for each thing this machine lacks.
    """
    asked = [sys.executable, "-W", "ignore", "-m", "megatron_async_rlhf.doctor", str(config)]
    try:
        told = subprocess.run(asked, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"run.device = cuda: asking for the GPUs took longer than {_TIMEOUT_S:g} s; see what nvidia-smi says"
        ) from None
    if told.returncode:
        lines = told.stdout.strip() or (told.stderr.strip().splitlines() or ["unknown"])[-1]
        raise ConfigError(
            lines if told.stdout.strip() else f"run.device = cuda: the machine cannot be examined: {lines}"
        )
