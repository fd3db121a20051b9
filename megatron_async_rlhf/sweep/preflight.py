"""Checks every point against the model and the data it will get, before the first of them starts."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import CheckpointError, ConfigError, DataError
from megatron_async_rlhf.jobs.inputs import (
    check_policy_weights,
    check_value_weights,
    load_run_inputs,
    make_model_template,
)
from megatron_async_rlhf.launch.run_directory import check_writable
from megatron_async_rlhf.sweep.points import Point, Sweep


def check_points(sweep: Sweep, points: Sequence[Point]) -> None:
    """As `train` will check each; of the policy that the warm start will leave, shape and tokenizer are known.

    Raises:
        ConfigError: a line for each point that cannot run.
    """
    problems: list[str] = []
    checked: list[RunConfig] = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        for point in points:
            alike = point.config.model_copy(update={"run": None, "schedule": None})  # neither matters here
            if alike in checked:
                continue
            checked.append(alike)
            try:
                check_writable(point.config)
                template = Path(scratch) / str(len(checked))
                start = sweep.warm_start or point.config
                make_model_template(start, template)
                architecture = load_run_inputs(point.config, template).architecture
                check_policy_weights(start, architecture)
                check_value_weights(point.config, architecture)
            except (CheckpointError, ConfigError, DataError) as error:
                problems.append(f"{point.name}: {'; '.join(str(error).splitlines())}")
    if problems:
        raise ConfigError("\n".join(problems))
