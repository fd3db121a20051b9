"""A recipe: stages that follow each other, each a command of `async-rlhf` with a configuration of its own.

recipe ──> stage ──> its directory, <dir>/<name>, which later stages name as {<name>}
"""

import copy
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from msgspec import Struct
from pydantic import Field, ValidationError

from megatron_async_rlhf.config.load import check_tree, dump_config, read_tree, set_key
from megatron_async_rlhf.config.messages import lines_of
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.config.section import LocalPath, Section
from megatron_async_rlhf.config.yaml_values import parse_value
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.launch.child_command import CONFIG_DIR
from megatron_async_rlhf.launch.stages import Stage as Submitted
from megatron_async_rlhf.launch.stages import end_in_time
from megatron_async_rlhf.suggestions import did_you_mean
from megatron_async_rlhf.telemetry.files import LOG_DIR

RECIPE = "pipeline.yaml"  # of a folder
Command = Literal["sft", "reward-model", "train", "eval"]
_NAME = r"^[A-Za-z][A-Za-z0-9_-]*$"
RESUMABLE = ("sft", "train", "eval")  # commands that continue with --resume
_TAKEN = {CONFIG_DIR, LOG_DIR, "name", "status", "seconds"}
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")


class StageKeys(Section):
    """One stage, as the file has it."""

    name: str = Field(pattern=_NAME)
    command: Command
    config: str  # a YAML file, relative to the recipe's
    set: dict[str, Any] = Field(
        default_factory=dict
    )  # overrides by section.key; {stage} is an earlier stage's directory


class RecipeKeys(Section):
    """The whole file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    dir: LocalPath | None = None  # default: runs/<name>
    stages: list[StageKeys] = Field(min_length=1)


class Stage(Struct, frozen=True, kw_only=True):
    """One stage, its configuration checked.

    Attributes:
        needs: earlier stages whose directories it reads.
        tree: its configuration with the placeholders still in it.
        file: what its file says, without what the recipe and the command line set.
    """

    name: str
    command: Command
    config: RunConfig
    needs: list[str]
    tree: dict[str, Any]
    file: dict[str, Any]


class Recipe(Struct, frozen=True, kw_only=True):
    """
    Attributes:
        directory: of the pipeline; every stage is a directory in it.
    """

    name: str
    directory: Path
    stages: list[Stage]


def load_recipe(path: Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe, or a folder's `pipeline.yaml`, and the configuration of every stage.

    Args:
        overrides: `stage.section.key=value`, or `name=...` and `dir=...` of the recipe itself.

    Raises:
        ConfigError: a line for each problem, beginning with the stage.
    """
    file = path / RECIPE if path.is_dir() else path
    own, by_stage = _split_overrides(overrides)
    keys = _check(file, read_tree(file, own))
    directory = keys.dir if keys.dir is not None else Path("runs") / keys.name
    names = [stage.name for stage in keys.stages]
    for name in names:
        if names.count(name) > 1 or name in _TAKEN:
            why = "has that name" if name in _TAKEN else "is called that too"
            raise ConfigError(f"{file}: the stage {name} must have another name: something else {why}")
    for name in by_stage:
        if name not in names:
            raise ConfigError(
                f"-s {name}.{by_stage[name][0]}: {did_you_mean(name, names, otherwise='there are the stages {names}')}"
            )
    stages: list[Stage] = []
    problems = []
    for number, stage in enumerate(keys.stages):
        try:
            stages.append(_stage(stage, file, directory, names[:number], by_stage.get(stage.name, [])))
        except ConfigError as error:
            problems += [f"{stage.name}: {line}" for line in str(error).splitlines()]
    if problems:
        raise ConfigError("\n".join(problems))
    return Recipe(name=keys.name, directory=directory, stages=stages)


def is_recipe(path: Path) -> bool:
    """Whether it is one, and no configuration."""
    if path.is_dir():
        return (path / RECIPE).is_file()
    return path.is_file() and "stages" in read_tree(path)


def stages_of(recipe: Recipe, seconds: float | None = None) -> list[Submitted]:
    """The recipe's stages as jobs that depend on each other. What an earlier launch has begun continues.

    Args:
        seconds: after which each is killed; those that save checkpoints do so in time.
    """
    return [
        Submitted(
            name=stage.name,
            arguments=[stage.command, "/dev/stdin", *(["--resume"] if stage.command in RESUMABLE else [])],
            config=_ending_in_time(stage, seconds),
            nodes=stage.config.launch.nodes,
            gpus_per_node=stage.config.launch.gpus_per_node if stage.config.run.device == "cuda" else None,
            result=stage.config.run.path,
        )
        for stage in recipe.stages
    ]


def _ending_in_time(stage: Stage, seconds: float | None) -> str:
    if stage.command not in ("sft", "train"):
        return dump_config(stage.config)
    tree = stage.config.model_dump(mode="json")
    end_in_time(tree, stage.config, seconds)
    return dump_config(check_tree(tree))


def filled(tree: dict[str, Any], directories: dict[str, Path]) -> dict[str, Any]:
    """The tree with stages' directories in the place of their names."""

    def fill(value: Any) -> Any:
        if isinstance(value, str):
            return _PLACEHOLDER.sub(lambda found: str(directories.get(found[1], found[0])), value)
        if isinstance(value, dict):
            return {key: fill(each) for key, each in value.items()}
        return [fill(each) for each in value] if isinstance(value, list) else value

    return fill(tree)


def _stage(keys: StageKeys, file: Path, directory: Path, earlier: list[str], overrides: list[str]) -> Stage:
    needs = _needed(keys, earlier)
    own = read_tree(file.parent / keys.config)
    tree = copy.deepcopy(own)
    for key, value in keys.set.items():
        set_key(tree, key, copy.deepcopy(value))
    for override in overrides:
        key, _, text = override.partition("=")
        set_key(tree, key, parse_value(text, tuple(key.split("."))))
    set_key(tree, "run.name", keys.name)
    set_key(tree, "run.dir", str(directory / keys.name))
    config = check_tree(filled(tree, {name: directory / name for name in needs}))
    return Stage(name=keys.name, command=keys.command, config=config, needs=needs, tree=tree, file=own)


def _needed(keys: StageKeys, earlier: list[str]) -> list[str]:
    found: list[str] = []
    for key, value in keys.set.items():
        for name in _placeholders(value):
            if name not in earlier:
                there_are = (
                    "no stage comes before it"
                    if not earlier
                    else did_you_mean(name, earlier, otherwise="before it come {names}")
                )
                raise ConfigError(f"set.{key} = {value}: {{{name}}} is no earlier stage; {there_are}")
            found.append(name)
    return [name for name in earlier if name in found]


def _placeholders(value: Any) -> list[str]:
    """In all texts of a value of YAML."""
    if isinstance(value, str):
        return _PLACEHOLDER.findall(value)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [name for each in inner for name in _placeholders(each)]


def _check(file: Path, tree: dict[str, Any]) -> RecipeKeys:
    try:
        return RecipeKeys.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{file}: {line}" for line in lines_of(error))) from None


def _split_overrides(overrides: Iterable[str]) -> tuple[list[str], dict[str, list[str]]]:
    own: list[str] = []
    by_stage: dict[str, list[str]] = {}
    for override in overrides:
        key, separator, text = override.partition("=")
        stage, dot, rest = key.strip().partition(".")
        if not separator or (not dot and stage not in ("name", "dir")):
            raise ConfigError(f"override {override!r} must look like stage.section.key=value, name=... or dir=...")
        if dot:
            by_stage.setdefault(stage, []).append(f"{rest}={text}")
        else:
            own.append(override)
    return own, by_stage
