"""Names inside a run directory: one place, because every process writes or reads some of them; how they are read and replaced."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megatron_async_rlhf.errors import ConfigError, WriteError
from megatron_async_rlhf.json_lines import read_json_lines
from megatron_async_rlhf.suggestions import closest

RESOLVED_CONFIG = "config.yaml"
INPUTS = "inputs.json"  # digests of the data and weights that the run was started with
METRICS = "metrics.jsonl"
WARM_START = "warm_start.jsonl"
SAMPLES = "samples.jsonl"
EVALUATIONS = "evaluations.jsonl"
SUMMARY = "summary.json"
TRACE = "trace.json"
SPANS = ".spans"  # during a run: what its timeline will be made of
WANDB_ID = "wandb_id"
TENSORBOARD_DIR = "tensorboard"
RESERVE = ".reserve"  # during a run: room for its last words on a disk that is full
STOP = "stop"  # whoever makes it asks the run to save and end
LOG_DIR = "logs"
EXIT_CODE = "logs/exit_code"  # of the command, once it has ended
PROCESSES = "logs/processes.json"  # name -> process id; `machines`: name -> machine
EVENTS = "logs/events.jsonl"  # the controller's events, for `async-rlhf watch`
POLICY_TEMPLATE_DIR = "model"  # Hugging Face config and tokenizer of the policy, without weights
CHECKPOINT_DIR = "checkpoints"
REFERENCE_DIR = "checkpoints/reference"  # the reference policy's weights, unless they can be read from model.hf
RUN_STATE = "run_state.msgpack"  # in a checkpoint: the controller's part
EXPORT_DIR = "checkpoints/final"  # the finished policy as a Hugging Face directory
ROLLOUT_DIR = "rollouts"  # what was trained on, with schedule.record
SERVED_DIR = "served"  # of an evaluation: each model as its servers load it
ANSWERS_DIR = "progress"  # of an evaluation: what it has so far, to continue from
ANSWERS = "answers.jsonl"
PAIRS = "pairs.jsonl"  # of an evaluation: preference pairs made of its answers
EVALUATION = "eval.json"
REWARD_CENTERS = "reward_centers.json"  # what is subtracted from a reward model's scores, by the reward's key
FAILED_BATCH = "non_finite_batch.json"  # whose loss was not finite; to be read
FAILED_ROLLOUT = "non_finite_rollout.msgpack"  # the same, to be trained again

_RESERVE_BYTES = 64 * 2**10


def check_is_run(directory: Path) -> None:
    """
    Raises:
        ConfigError: it is no run's directory.
    """
    if (directory / RESOLVED_CONFIG).is_file():
        return
    beside = [each.parent.name for each in directory.parent.glob(f"*/{RESOLVED_CONFIG}")]
    meant = closest(directory.name, beside)
    why = f"it has no {RESOLVED_CONFIG}" if directory.is_dir() else "there is no such directory"
    way_out = "" if meant is None else f"; did you mean {directory.with_name(meant)}?"
    raise ConfigError(f"{directory} is no run's directory: {why}{way_out}")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All lines of a `.jsonl` file; none if it is not there. Who wrote it may have been killed in the middle of one.

    Raises:
        DataError: another line is broken (named as file:line).
    """
    return [line.record for line in read_json_lines(path, may_be_cut=True)] if path.exists() else []


def read_steps(path: Path) -> list[dict[str, Any]]:
    """As `read_lines`, of a file with a `step` in each line: the N-th optimizer step has N.

    Version 0.1.0 counted from 0: what it wrote is read as if it had counted from 1.
    """
    lines = read_lines(path)
    if any(line["step"] == 0 for line in lines):
        return [line | {"step": line["step"] + 1} for line in lines]
    return lines


def replace_file(path: Path, content: str | bytes) -> None:
    """In one step, so that a reader, or a crash, never meets half of it. Text is written as UTF-8."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(partial, path)
    except OSError:
        with suppress(OSError):
            partial.unlink()
        raise


def hold_reserve(run_dir: Path) -> None:
    """Take the room on the disk that the last summary of a run takes. Raises OSError if there is none."""
    with (run_dir / RESERVE).open("wb") as file:
        file.write(os.urandom(_RESERVE_BYTES))  # nothing that a file system could store in less
        file.flush()
        os.fsync(file.fileno())


def release_reserve(run_dir: Path) -> None:
    """Give it back, to be used at once."""
    with suppress(OSError):
        (run_dir / RESERVE).unlink()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around whatever writes `path`: Python does not say which file it was that found the disk full.

    Raises:
        WriteError: one line.
    """
    try:
        yield
    except OSError as error:
        raise WriteError(unwritten(path, error)) from error


def unwritten(path: Path, error: OSError) -> str:
    """One line: the file, the cause and, where that is known, the way out."""
    if isinstance(error.filename, str) and not error.filename.startswith(str(path)):
        path = Path(error.filename)  # another one was in the way, such as a temporary directory
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    way_out = "; make room there, then continue with --resume" if full else ""
    return f"{path} cannot be written ({error.strerror or error}){way_out}"
