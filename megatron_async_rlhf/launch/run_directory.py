"""Makes the directory of a run; an earlier run found there is set aside, never overwritten, or continued with."""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_async_rlhf.checkpoint.run_checkpoints import RunCheckpoints
from megatron_async_rlhf.checkpoint.run_state import read_run_state
from megatron_async_rlhf.config.load import dump_config
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.data.files import is_local
from megatron_async_rlhf.errors import ConfigError, DataError
from megatron_async_rlhf.jobs.inputs import value_source
from megatron_async_rlhf.json_lines import read_json_lines
from megatron_async_rlhf.launch.owner import owner_path
from megatron_async_rlhf.scheduler.recording import RolloutLog
from megatron_async_rlhf.telemetry.files import (
    EVALUATIONS,
    METRICS,
    POLICY_TEMPLATE_DIR,
    RESOLVED_CONFIG,
    ROLLOUT_DIR,
    SAMPLES,
    replace_file,
)


@contextmanager
def writing_run_directory(config: RunConfig) -> Iterator[None]:
    """
    Raises:
        ConfigError: what is done inside raised OSError.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(f"run.dir = {config.run.path}: cannot be written ({error.strerror or error})") from None


def create_run_directory(config: RunConfig, template: Path) -> tuple[Path, Path | None]:
    """The new run's directory, holding the resolved config and the model template, and where an old run went.

    Raises:
        ConfigError: the directory cannot be written, or holds something that is not a run.
    """
    directory = config.run.path.resolve()
    with writing_run_directory(config):
        aside = _set_aside(directory, owner_path(config))
        directory.mkdir(parents=True, exist_ok=True)
        (directory / RESOLVED_CONFIG).write_text(dump_config(config), encoding="utf-8")
        shutil.copytree(template, directory / POLICY_TEMPLATE_DIR)
    return directory, aside


def reopen_run_directory(config: RunConfig, version: int) -> Path:
    """The directory of a run that continues from the checkpoint of `version`: what came after that is cut off.

    Raises:
        ConfigError: the directory cannot be written.
        CheckpointError: the checkpoint cannot be read.
        DataError: a line of its files is broken, other than the last one, which a kill cuts off. Nothing is changed.
    """
    directory = config.run.path.absolute()
    checkpoints = RunCheckpoints(directory)
    evaluated = read_run_state(checkpoints.path(version)).totals.evaluation.keys() - {"after"}
    with writing_run_directory(config):
        # All are read before anything is changed: one may have a line that nobody wrote like that.
        kept = {
            METRICS: _lines_to_keep(directory / METRICS, lambda line: line["step"] <= version, numbered=True),
            SAMPLES: _lines_to_keep(directory / SAMPLES, lambda line: line["step"] <= version, numbered=True),
            EVALUATIONS: _lines_to_keep(directory / EVALUATIONS, lambda line: line["when"] in evaluated),
        }
        checkpoints.remove_leftovers()
        checkpoints.discard_newer(version)
        RolloutLog(directory / ROLLOUT_DIR).cut(version)
        for name, lines in kept.items():
            if (directory / name).exists():
                replace_file(directory / name, lines)
        replace_file(directory / RESOLVED_CONFIG, dump_config(config))
    return directory


def keep_run_directory(config: RunConfig) -> Path:
    """The directory as it is, with this configuration.

    Raises:
        ConfigError: it cannot be written.
    """
    directory = config.run.path.absolute()
    with writing_run_directory(config):
        replace_file(directory / RESOLVED_CONFIG, dump_config(config))
    return directory


def check_writable(config: RunConfig) -> None:
    """Find out early, leaving nothing behind.

    Raises:
        ConfigError: the nearest existing parent of the run directory cannot be written.
    """
    parent = config.run.path.absolute()
    while not parent.exists():
        parent = parent.parent
    try:
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        raise ConfigError(
            f"run.dir = {config.run.path}: {parent} cannot be written ({error.strerror or error})"
        ) from None


def check_inputs_apart(config: RunConfig) -> None:
    """That a new run reads nothing that lies where it will be: what is there is renamed before it starts.

    Raises:
        ConfigError: it does.
    """
    inputs = {"model.hf": config.model.hf, "algorithm.value_hf": value_source(config)}
    if config.eval is not None:
        inputs["eval.against"] = config.eval.against if isinstance(config.eval.against, Path) else None
        inputs["eval.kl_to"] = config.eval.kl_to
    inputs |= {f"{key}.model": section.model for key, section in config.reward_models.items()}
    for key, source in (("data.train", config.data.train), ("data.eval", config.data.eval)):
        inputs[key] = Path(source) if source is not None and is_local(source) else None
    for key, given in inputs.items():
        if given is not None and given.resolve().is_relative_to(config.run.path.resolve()):
            raise ConfigError(
                f"{key} = {given} is inside run.dir = {config.run.path}, and a new run sets aside what is there; choose "
                "another run.name or run.dir"
            )


def _lines_to_keep(path: Path, is_kept: Callable[[dict[str, Any]], bool], *, numbered: bool = False) -> bytes:
    """As they were written; but steps that version 0.1.0 numbered from 0 are numbered from 1."""
    if not path.exists():
        return b""
    kept, from_0 = [], None
    for line in read_json_lines(path, may_be_cut=True):
        try:
            record, raw = line.record, line.raw
            if numbered and from_0 is None:
                from_0 = record["step"] == 0
            if from_0:
                record = record | {"step": record["step"] + 1}
                raw = json.dumps(record, ensure_ascii=False).encode()
            if is_kept(record):
                kept.append(raw + b"\n")
        except (KeyError, TypeError):
            raise DataError(f"{path}:{line.number}: this run did not write it; remove the line to resume") from None
    return b"".join(kept)


def _set_aside(directory: Path, owner: Path) -> Path | None:
    if not directory.exists() or all(path == owner for path in directory.iterdir()):
        return None
    if not (directory / RESOLVED_CONFIG).exists():
        raise ConfigError(f"run.dir = {directory} exists and is not a run; choose another run.name or run.dir")
    number = 1
    while (aside := directory.with_name(f"{directory.name}.{number}")).exists():
        number += 1
    directory.rename(aside)
    return aside
