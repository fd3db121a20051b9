"""Which commands a launch consists of: their configurations, in which order, on how many machines. Starts nothing.

    tree ──> sft ──> its export is train's `model.hf` ──> train ──> export-hf

Each stage needs the one before it. Its configuration is written out when it is submitted: what was checked then is what
runs, however long the job waits in a queue.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from msgspec import Struct

from megatron_async_rlhf.config.load import check_tree, set_key
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.telemetry.files import EXPORT_DIR
from megatron_async_rlhf.telemetry.summary import is_completed

STAGES = ("sft", "train", "export")
_MARGIN_S = 60.0  # beside `launch.interrupt_grace_s`: to end, and for clocks of machines that differ


class Stage(Struct, frozen=True, kw_only=True):
    """One command of `async-rlhf`, run once on each of so many machines.

    Attributes:
        arguments: of `async-rlhf`.
        config: YAML, on the standard input; empty if the command takes none.
        gpus_per_node: of its machines; None: as the launch's configuration says.
        resumes: requeued, it continues with `--resume`.
        result: where what it makes lies.
    """

    name: str
    arguments: list[str]
    config: str = ""
    nodes: int = 1
    gpus_per_node: int | None = None
    resumes: bool = False
    result: Path


def parse_stages(text: str) -> list[str]:
    """`sft,train,export` of the command line, in the order they run in.

    Raises:
        ConfigError: there is no such stage.
    """
    named = [name.strip() for name in text.split(",")]
    for name in named:
        if name not in STAGES:
            raise ConfigError(f"--stages {text}: there is no stage {name!r}, only {', '.join(STAGES)}")
    return [name for name in STAGES if name in named]


def expand_stages(
    tree: dict[str, Any],
    names: Sequence[str],
    *,
    directory: Path,
    resume: bool = False,
    export_to: Path | None = None,
    seconds: float | None = None,
) -> list[Stage]:
    """The stages that the sections in `tree` stand for. `sft` runs in `<run.dir>-sft`; the export goes to `<run.dir>-hf`.

    Args:
        names: of `STAGES`, in their order.
        directory: where relative paths begin; it may be on another machine.
        seconds: after which each stage is killed; sft and train save a checkpoint and end in time.
        resume: an sft that is completed is left out; sft and train continue from the last checkpoint in their directories.

    Raises:
        ConfigError: a line for each problem of the configuration.
    """
    base = check_tree(tree)
    made, stages = base.run.path, []
    train_tree = copy.deepcopy(tree)
    if "sft" in names:
        sft = _sft(tree, base, resume, seconds)
        made = sft.result
        if not (resume and is_completed(directory / made)):
            stages.append(sft)
        start_from(train_tree, base, made / EXPORT_DIR)
    if "train" in names:
        end_in_time(train_tree, base, seconds)
        stages.append(_train(train_tree, resume))
        made = stages[-1].result
    if "export" in names:
        out = export_to or base.run.path.with_name(f"{base.run.path.name}-hf")
        _check_empty(directory / out)
        stages.append(Stage(name="export", arguments=["export-hf", str(made), str(out)], result=out))
    return stages


def _sft(tree: dict[str, Any], base: RunConfig, resume: bool, seconds: float | None) -> Stage:
    if base.sft is None and not base.warm_start.steps:
        raise ConfigError(
            "--stages sft: the configuration has no section sft, and warm_start.steps = 0; set one of them"
        )
    own = copy.deepcopy(tree)
    directory = base.run.path.with_name(f"{base.run.path.name}-sft")
    set_key(own, "run.name", f"{base.run.name}-sft")
    set_key(own, "run.dir", str(directory))
    end_in_time(own, base, seconds)
    check_tree(own)
    return Stage(
        name="sft",
        arguments=["sft", "/dev/stdin", *(["--resume"] if resume else [])],
        config=_written(own),
        nodes=base.launch.nodes,
        resumes=not resume,
        result=directory,
    )


def start_from(tree: dict[str, Any], base: RunConfig, policy: Path) -> None:
    """Make the sections in `tree` those of a run on an exported policy: it has its shape and tokenizer, and its warm start
    is over."""
    tree["model"] = {"hf": str(policy)}
    if base.model.context_length is not None:
        tree["model"]["context_length"] = base.model.context_length
    set_key(tree, "warm_start.steps", 0)


def end_in_time(tree: dict[str, Any], base: RunConfig, seconds: float | None) -> None:
    """What comes at the limit itself leaves a few seconds (KillWait), too few for the checkpoint of a large model."""
    if seconds is not None and base.checkpoint.max_run_seconds is None:
        margin = base.launch.interrupt_grace_s + _MARGIN_S
        set_key(tree, "checkpoint.max_run_seconds", max(seconds - margin, seconds / 2))


def _check_empty(out: Path) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"{out}, which export would write, exists; remove it, or choose another with --export-to")


def _train(tree: dict[str, Any], resume: bool) -> Stage:
    config = check_tree(tree)
    return Stage(
        name="train",
        arguments=["train", "/dev/stdin", *(["--resume"] if resume else [])],
        config=_written(tree),
        nodes=config.launch.nodes,
        resumes=not resume,
        result=config.run.path,
    )


def _written(tree: dict[str, Any]) -> str:
    return yaml.safe_dump(tree, sort_keys=False)
