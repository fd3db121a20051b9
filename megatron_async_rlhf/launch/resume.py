"""What `train --resume` continues from: looked up and checked before any process starts, nothing changed."""

import json
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from megatron_async_rlhf.checkpoint.run_checkpoints import RunCheckpoints
from megatron_async_rlhf.config.load import load_config
from megatron_async_rlhf.config.resume import check_same_run
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import CheckpointError, ConfigError
from megatron_async_rlhf.formats.hub_snapshot import with_local_models
from megatron_async_rlhf.telemetry.files import INPUTS, RESOLVED_CONFIG
from megatron_async_rlhf.telemetry.summary import read_summary


class Resumption(Struct, frozen=True, kw_only=True):
    """What there is to continue from.

    Attributes:
        note: one line for who asked; empty if nobody did.
        version: policy version of the checkpoint; None if there is none, and the run starts from the beginning.
        finished: the run has made all its steps: nothing to do.
    """

    note: str = ""
    version: int | None = None
    finished: bool = False


def load_for_run(config: Path, overrides: Sequence[str], resume: bool, *, weights: bool = True) -> RunConfig:
    """The configuration to run; a run's directory stands for that run, wherever it has been moved to.

    Args:
        weights: of models that are named as at the hub, also get these, and not only what describes them.

    Raises:
        ConfigError: a line for each problem of the configuration; or a run's directory for a new run; or a model cannot
            be had.
    """
    return with_local_models(_load(config, overrides, resume), weights=weights)


def _load(config: Path, overrides: Sequence[str], resume: bool) -> RunConfig:
    if not (config / RESOLVED_CONFIG).is_file():
        return load_config(config, overrides)
    if not resume:
        raise ConfigError(
            f"{config} is the directory of a run: add --resume to train to continue with it, or give "
            f"{config / RESOLVED_CONFIG} and another -s run.name=... for a new run like it"
        )
    resolved = load_config(config, overrides)
    if resolved.run.path.resolve() == config.resolve():
        return resolved
    return load_config(config, [f"run.dir={json.dumps(str(config.absolute()), ensure_ascii=False)}", *overrides])


def find_resumption(config: RunConfig, *, steps: int, key: str, has_reference: bool) -> Resumption:
    """Look into `run.dir`.

    Args:
        steps: that the run is to make, as `key` says.
        has_reference: a checkpoint is no use without the reference policy in the run's directory.

    Raises:
        ConfigError: a key has changed that must not, or a completed run without a checkpoint is to make more steps.
        CheckpointError: the newest checkpoint is broken.
    """
    run_dir = config.run.path.absolute()
    if not (run_dir / RESOLVED_CONFIG).is_file():
        return Resumption(note=f"{run_dir} holds no run yet: starting from the beginning")
    summary, checkpoints = read_summary(run_dir), RunCheckpoints(run_dir)
    completed, made = summary.get("status") == "completed", summary.get("steps", 0)
    finished, versions = completed and made >= steps, checkpoints.versions()
    if completed and not (finished or versions):
        raise ConfigError(
            f"{key} = {steps}: {run_dir} is completed after {made} steps and has no checkpoint to continue from, "
            "which takes checkpoint.every_steps from its start; run without --resume to start over"
        )
    if not (finished or versions):
        return Resumption(note=f"{run_dir} has no checkpoint yet: starting from the beginning")
    has_digests = (run_dir / INPUTS).is_file()  # compared when the data is loaded
    check_same_run(load_config(run_dir / RESOLVED_CONFIG), config, contents_are_compared=has_digests)
    if finished:
        return Resumption(note=f"{run_dir} is completed: all {made} steps are made", finished=True)
    version = versions[-1]
    if version > steps:
        raise ConfigError(f"{key} = {steps} is below the {version} steps of {checkpoints.path(version)}; raise it")
    _check(checkpoints, has_reference)
    return Resumption(note=f"continuing from {checkpoints.path(version)}", version=version)


def _check(checkpoints: RunCheckpoints, has_reference: bool) -> None:
    from megatron_async_rlhf.checkpoint.integrity import (
        check_reference,
        check_run_checkpoint,
    )  # brings torch, for broken files only

    start_over = "run without --resume"
    try:
        if has_reference:
            check_reference(checkpoints.reference)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {start_over}") from None
    whole, broken = checkpoints.newest(check_run_checkpoint)
    if broken:
        way_out = (
            start_over if whole is None else f"delete {' and '.join(map(str, broken))} to continue from step {whole}"
        )
        raise CheckpointError(f"{next(iter(broken.values()))}; {way_out}")
