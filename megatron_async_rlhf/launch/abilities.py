"""Asks how many GPUs this machine has and whether it can run a configuration on them, before anything is started."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from megatron_async_rlhf.config.load import dump_config
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.environment import child_environment
from megatron_async_rlhf.errors import ConfigError


def count_gpus(config: RunConfig) -> int:
    """That the run may use here; in a process of its own, which forgets them again.

    Raises:
        ConfigError: a line for each thing this machine lacks.
    """
    if config.run.device == "cpu":
        return 0
    limit = config.launch.join_timeout_s  # of it, torch and Megatron are imported, and CUDA started
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        path = Path(scratch) / "config.yaml"
        path.write_text(dump_config(config), encoding="utf-8")
        asked = [sys.executable, "-W", "ignore", "-m", "megatron_async_rlhf.doctor.checks", str(path)]
        try:
            told = subprocess.run(
                asked,
                capture_output=True,
                encoding="utf-8",
                timeout=limit,
                check=False,
                env=child_environment(os.environ, {}),
            )
        except subprocess.TimeoutExpired:
            raise ConfigError(
                f"run.device = cuda: asking for the GPUs took longer than launch.join_timeout_s = {limit:g}: see whether "
                "nvidia-smi answers; from a slow file system importing torch takes minutes the first time: raise it then"
            ) from None
    if told.returncode:
        reason = (told.stderr.strip().splitlines() or ["unknown"])[-1]
        raise ConfigError(f"run.device = cuda: the machine cannot be examined: {reason}")
    answer = json.loads(told.stdout.splitlines()[-1])  # what packages print when they are imported comes before
    if answer["problems"]:
        raise ConfigError("\n".join(answer["problems"]))
    return answer["gpus"]
