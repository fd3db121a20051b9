"""From a YAML file and `key=value` overrides to a checked `RunConfig`; every error is one line."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megatron_async_rlhf.config.messages import lines_of
from megatron_async_rlhf.config.root import FOR_PLAN, RunConfig
from megatron_async_rlhf.config.yaml_values import comment_in, parse_value
from megatron_async_rlhf.errors import ConfigError

RESOLVED_CONFIG = "config.yaml"  # in a run directory
_KEY = re.compile(r"[A-Za-z_][\w.-]*")
# A key with a value as other programs take it.
_HABIT = re.compile(
    r"(?:-s\s*|--set[\s=]|--|\+\+|\+)?"
    r"(?P<key>[A-Za-z_]\w*(?:\.\w[\w-]*)+(?=[=:\s])|[A-Za-z_]\w*(?==))"
    r"\s*[=:\s]\s*(?P<value>\S.*)",
    re.DOTALL,
)


def load_config(path: Path, overrides: Iterable[str] = (), *, for_plan: bool = False) -> RunConfig:
    """Read `path`, apply overrides in order, check everything that needs no other file.

    Args:
        for_plan: as `check_tree`.

    Raises:
        ConfigError: one line per problem, each naming key, value and rule.
    """
    return check_tree(read_tree(path, overrides), for_plan=for_plan)


def read_tree(path: Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """The sections in `path` as plain values, with overrides applied in order and nothing else checked.

    Raises:
        ConfigError: no YAML file of sections, or an override that is none.
    """
    path = path / RESOLVED_CONFIG if (path / RESOLVED_CONFIG).is_file() else path  # of a run
    text = _read(path)
    try:
        tree = parse_value(text)
    except ConfigError as error:
        is_syntax = str(error).startswith("not valid YAML")
        raise ConfigError(f"config file {path} is {error}" if is_syntax else f"config file {path}, {error}") from None
    if not isinstance(tree, dict):
        what = {list: "not a list", str: "not text", type(None): "and is empty"}.get(type(tree), "not a single value")
        raise ConfigError(f"config file {path} must hold sections (run, model, learner...), {what}")
    for override in overrides:
        _apply_override(tree, override)
    return tree


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        meant = override_of(str(path))
        way_out = "" if meant is None else f"; the configuration comes first, then overrides as -s {meant}"
        raise ConfigError(f"config file {path} does not exist{way_out}") from None
    except IsADirectoryError:
        raise ConfigError(
            f"config file {path} cannot be read: it is a directory without {RESOLVED_CONFIG}; give a YAML file, or a run's "
            "directory"
        ) from None
    except OSError as error:
        raise ConfigError(f"config file {path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"config file {path} cannot be read: line {line} is not UTF-8; save it as UTF-8") from None


def check_tree(tree: dict[str, Any], *, for_plan: bool = False) -> RunConfig:
    """
    Args:
        for_plan: a plan will replace the layout, which may be for more GPUs than there are.

    Raises:
        ConfigError: one line per problem, each naming key, value and rule.
    """
    try:
        return RunConfig.model_validate(tree, context={FOR_PLAN: for_plan})
    except ValidationError as error:
        raise ConfigError("\n".join(lines_of(error))) from None


def set_key(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set `section.key` in `tree`, making the sections on the way; a number is an entry of a list, as in `reward.0.weight`.

    Raises:
        ConfigError: a section on the way is a value, or a list has no such entry.
    """
    node: Any = tree
    parts = key.split(".")
    for depth, part in enumerate(parts):
        where = ".".join(parts[:depth])
        if isinstance(node, list):
            if not part.isdecimal() or int(part) >= len(node):
                entries = f"{where}.0 to {where}.{len(node) - 1}" if node else "none"
                raise ConfigError(f"override {key!r}: {where} is a list, whose entries are {entries}")
            place: Any = int(part)
        elif isinstance(node, dict):
            place = part
        else:
            raise ConfigError(f"override {key!r}: {where} is a value, not a section")
        if depth == len(parts) - 1:
            node[place] = value
            return
        if isinstance(node, dict) and node.get(place) is None:
            node[place] = {}
        node = node[place]


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML; loading it again gives an equal `RunConfig`."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    key = key.strip()
    if not separator or not all(key.split(".")) or not _KEY.fullmatch(key):
        raise ConfigError(f"override {override!r} must look like section.key=value{_instead(override)}")
    try:
        value = parse_value(text, tuple(key.split(".")))
        comment = comment_in(text)
    except ConfigError as error:
        reason = str(error).replace("line 1: ", "", 1)  # it has one
        is_syntax = reason.startswith("not valid YAML")
        raise ConfigError(f"override {override!r}: {'the value is ' if is_syntax else ''}{reason}") from None
    if comment:
        raise ConfigError(f"override {override!r}: YAML takes {comment!r} for a comment; put the value in quotes")
    set_key(tree, key, value)


def override_of(argument: str) -> str | None:
    """The override that somebody meant who wrote it as for Hydra, argparse or OmegaConf (`+a.b=1`, `--a.b=1`, `a.b:1`).

    None if it resembles none.
    """
    found = _HABIT.fullmatch(argument.strip())
    return f"{found['key']}={found['value'].strip()}" if found else None


def _instead(override: str) -> str:
    if override.startswith("~"):
        return f"; to set a key back to nothing: -s {override[1:].partition('=')[0]}=null"
    meant = override_of(override)
    return f": write -s {meant}" if meant is not None and meant != override else ""
