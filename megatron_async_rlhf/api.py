"""Runs from Python: `from megatron_async_rlhf import load_config, train`. The processes are those that the command starts.

config = load_config("examples/quickstart.yaml", {"schedule.steps": 5})
run = train(config, reward=my_score, on_step=lambda step: print(step["reward"]))
run.after["reward"], run.policy
"""

import ast
import dis
import inspect
import json
import multiprocessing
import threading
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from textwrap import dedent
from types import CodeType, FunctionType
from typing import Any

from msgspec import Struct

from megatron_async_rlhf.config.load import check_tree, read_tree, set_key
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import ConfigError, RunError
from megatron_async_rlhf.launch.display import Display
from megatron_async_rlhf.telemetry.files import EXPORT_DIR, METRICS, read_steps
from megatron_async_rlhf.telemetry.summary import read_summary

Metrics = dict[str, Any]  # a line of metrics.jsonl
_STEP = "step"


class Run(Struct, frozen=True, kw_only=True):
    """What a run came to.

    Attributes:
        status: `completed` or `interrupted`.
        steps: the metrics of every optimizer step (docs/run_directory.md).
        before, after: held-out metrics of the policy it began with and of the trained one; empty without held-out prompts.
        summary: `summary.json`.
    """

    directory: Path
    status: str
    steps: list[Metrics]
    before: dict[str, float]
    after: dict[str, float]
    summary: dict[str, Any]

    @property
    def policy(self) -> Path:
        """The trained policy as a Hugging Face directory, once the run is completed."""
        return self.directory / EXPORT_DIR


def load_config(source: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """
    Args:
        source: a YAML file, a run's directory, or the sections themselves.
        overrides: values by key, such as `{"schedule.steps": 5}`.

    Raises:
        ConfigError: one line per problem, each naming key, value and rule.
    """
    tree = deepcopy(dict(source)) if isinstance(source, Mapping) else read_tree(Path(source))
    for key, value in (overrides or {}).items():
        set_key(tree, key, value)
    return check_tree(tree)


def train(
    config: RunConfig | str | Path | Mapping[str, Any],
    *,
    reward: Callable[..., list[float]] | None = None,
    on_step: Callable[[Metrics], None] | None = None,
    resume: bool = False,
) -> Run:
    """Run the whole RLHF job and wait for its end, as `async-rlhf train` does; Ctrl-C ends it in the same way.

    Args:
        config: a configuration, the file of one, or its sections; with `resume` also a run's directory.
        reward: in the place of `config.reward`: a function of the completions (docs/rewards.md), which works in processes of
            its own. One of a script or a notebook is copied by its source, so it must import what it needs inside itself.
        on_step: called after every optimizer step with its metrics.

    Raises:
        ConfigError, DataError, CheckpointError: one line; nothing was started.
        RunError: the run failed; the message says why and where.
    """
    from megatron_async_rlhf.formats.hub_snapshot import with_local_models
    from megatron_async_rlhf.launch.command import run_training
    from megatron_async_rlhf.launch.resume import load_for_run

    if multiprocessing.parent_process() is not None:
        raise ConfigError(
            'train: called by a process that imports the script; put the call below if __name__ == "__main__":'
        )
    if threading.current_thread() is not threading.main_thread():
        raise ConfigError("train: must be called from the main thread, which Ctrl-C and other signals reach")
    if isinstance(config, str | Path):
        resolved = load_for_run(Path(config), [], resume)
    else:
        resolved = with_local_models(config if isinstance(config, RunConfig) else load_config(config))
    if resolved.launch.nodes > 1:
        raise ConfigError(
            f"train: launch.nodes = {resolved.launch.nodes}: from Python a run has one machine; start `async-rlhf train` on each"
        )
    if reward is not None:
        resolved = _with_reward(resolved, reward)
    directory = resolved.run.path.absolute()
    code = run_training(resolved, resume=resume, display=lambda: _Told(directory, on_step))
    summary = read_summary(directory)
    if code and summary.get("status") != "interrupted":
        raise RunError(f"{directory}: {summary.get('error') or 'the run failed'}; its logs are in {directory / 'logs'}")
    evaluations = summary.get("eval", {})
    return Run(
        directory=directory,
        status=summary["status"],
        steps=read_steps(directory / METRICS),
        before=evaluations.get("before", {}),
        after=evaluations.get("after", {}),
        summary=summary,
    )


class _Told(Display):
    """Also tells a function of every step."""

    def __init__(self, directory: Path, on_step: Callable[[Metrics], None] | None) -> None:
        from megatron_async_rlhf.launch.held_memory import HeldMemory

        super().__init__(memory=HeldMemory(directory))
        self._on_step, self._path = on_step, directory / METRICS
        self._read = 0  # bytes of the file

    def show(self, event: Metrics, now: float | None = None) -> None:
        super().show(event, now)
        if event["event"] == "phase":  # the controller may have been started again, and the file have become shorter
            self._read = 0
        if self._on_step is not None and event["event"] == _STEP:
            self._on_step(self._metrics_of(event[_STEP]))

    def _metrics_of(self, step: int) -> Metrics:
        """Its line is written before its event is told; those of earlier starts are passed over."""
        with self._path.open("rb") as file:
            file.seek(self._read)
            for line in file:
                self._read += len(line)
                metrics = json.loads(line)
                if metrics[_STEP] == step:
                    return metrics
        raise RunError(f"{self._path}: has no line of step {step}")


def _with_reward(config: RunConfig, function: Callable[..., list[float]]) -> RunConfig:
    tree = config.model_dump(mode="json", exclude_unset=True)
    tree["reward"] = {"type": "function", "name": function.__name__, "function": _named(config, function)}
    return check_tree(tree)


def _named(config: RunConfig, function: Callable[..., list[float]]) -> str:
    """As a configuration names a function: `FILE.py:NAME`. What only the running program has is written to a file of its own.

    Raises:
        ConfigError: it cannot be, because it needs what is outside of it.
    """
    name = getattr(function, "__name__", "")
    if not inspect.isfunction(function) or not name.isidentifier():
        raise ConfigError(
            f"reward: {name or function} must be a function made with def, or set reward.function in the configuration"
        )
    file = inspect.getsourcefile(function)
    if function.__module__ != "__main__" and file is not None and "<locals>" not in function.__qualname__:
        return f"{file}:{name}"
    try:
        source = dedent(inspect.getsource(function))
    except OSError:
        raise ConfigError(
            f"reward: Python does not know the source of {name}, as of what is typed at its prompt: write it to a file and set "
            f"reward.function to FILE.py:{name}"
        ) from None
    if needed := [other for other in _from_outside(function, source) if other != name]:
        raise ConfigError(
            f"reward: {name} uses {', '.join(needed)} from outside of it, which its processes do not have: import or define "
            f"that inside the function, or put both into a file and set reward.function to FILE.py:{name}"
        )
    path = config.run.path.absolute().with_name(f"{config.run.path.name}.reward.py")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"from __future__ import annotations\n\n\n{source}", encoding="utf-8")  # nobody looks at them
    return f"{path}:{name}"


def _from_outside(function: FunctionType, source: str) -> list[str]:
    """Variables that it reads and does not have itself, those of its inner functions, decorators and defaults too."""
    (made,) = ast.parse(source).body
    assert isinstance(made, ast.FunctionDef | ast.AsyncFunctionDef)
    first = [*made.decorator_list, *made.args.defaults, *filter(None, made.args.kw_defaults)]
    named = [node.id for each in first for node in ast.walk(each) if isinstance(node, ast.Name)]
    codes = [function.__code__]
    for code in codes:
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    read = [step.argval for code in codes for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"]
    names = dict.fromkeys([*named, *read])
    return [*function.__code__.co_freevars, *(name for name in names if name in function.__globals__)]
