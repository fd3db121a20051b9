"""From a YAML file and `key=value` overrides to a checked `RunConfig`; every error is one line."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megatron_async_rlhf.config.algorithms import SECTIONS
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import ConfigError


def load_config(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read `path`, apply overrides in order, check everything that needs no other file.

    Raises:
        ConfigError: one line per problem, each naming key, value and rule.
    """
    return check_tree(read_tree(path, overrides))


def read_tree(path: Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """The sections in `path` as plain values, with overrides applied in order and nothing else checked.

    Raises:
        ConfigError: no YAML file of sections, or an override that is none.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"config file {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"config file {path} must hold sections (run, model, learner...), not {type(tree).__name__}")
    for override in overrides:
        _apply_override(tree, override)
    return tree


def check_tree(tree: dict[str, Any]) -> RunConfig:
    """
    Raises:
        ConfigError: one line per problem, each naming key, value and rule.
    """
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_lines_of(error))) from None


def set_key(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set `section.key` in `tree`, making the sections on the way.

    Raises:
        ConfigError: a section on the way is a value.
    """
    node, parts = tree, key.split(".")
    for depth, part in enumerate(parts[:-1]):
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            raise ConfigError(f"override {key!r}: {'.'.join(parts[: depth + 1])} is a value, not a section")
    node[parts[-1]] = value


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML; loading it again gives an equal `RunConfig`."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    key = key.strip()
    if not separator or not all(key.split(".")):
        raise ConfigError(f"override {override!r} must look like section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: the value is not valid YAML") from None
    if isinstance(value, str) and f"{value} #" in text and text.strip()[:1] not in "'\"|>":
        raise ConfigError(f"override {override!r}: in YAML ` #` begins a comment; put the value in quotes")
    set_key(tree, key, value)


def _lines_of(error: ValidationError) -> list[str]:
    lines = []
    for item in error.errors(include_url=False):
        key = ".".join(str(part) for part in item["loc"] if part not in SECTIONS)
        if item["type"] == "extra_forbidden":
            lines.append(f"{key} = {_shown(item['input'])}: no such key; {_known_keys(item['loc'][:-1])}")
        elif item["type"] == "algorithm_type":
            value = item["input"]["type"] if isinstance(item["input"], dict) else item["input"]
            lines.append(f"algorithm.type = {_shown(value)}: must be one of {', '.join(SECTIONS)}")
        elif item["type"] == "missing":
            lines.append(f"{key}: missing")
        elif item["type"] == "value_error":
            rule = str(item["ctx"]["error"])
            if key and not isinstance(item["input"], dict):  # of a section the rule names the keys it is about
                key = f"{key} = {_shown(item['input'])}"
            lines.append(f"{key}: {rule}" if key else rule)
        else:
            lines.append(f"{key} = {_shown(item['input'])}: {item['msg'][0].lower()}{item['msg'][1:]}")
    return lines


def _shown(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 80 else text[:77] + "..."


def _known_keys(location: tuple) -> str:
    model, whose = RunConfig, ""
    for part in location:
        if part in SECTIONS:  # the type of algorithm, which pydantic adds to the key
            model, whose = SECTIONS[part], f" with algorithm.type = {part}"
            continue
        if part == "algorithm":
            continue
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        model = next(c for c in candidates if isinstance(c, type) and hasattr(c, "model_fields"))
    hint = f"; to replace all of the section: -s 'algorithm={{type: {location[1]}}}'" if whose else ""
    return f"known here{whose}: {', '.join(model.model_fields)}{hint}"
