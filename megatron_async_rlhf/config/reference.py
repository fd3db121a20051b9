"""All keys of the configuration with type, default and meaning: for docs/configuration.md, and as a JSON schema for editors."""

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from msgspec import Struct
from pydantic.fields import FieldInfo

from megatron_async_rlhf.config.described import about, meanings
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.config.schema import TYPED, alternatives, is_section
from megatron_async_rlhf.config.section import Section, written
from megatron_async_rlhf.config.units import unit_of

_PLAIN = {int: "whole number", float: "number", str: "text", bool: "true or false", NoneType: "null", Any: "anything"}
_LIMITS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}  # as annotations call them


class DescribedKey(Struct, frozen=True, kw_only=True):
    """
    Attributes:
        key: its full name, such as `schedule.steps`.
        kind: what values it takes, in words.
        default: as YAML has it; empty if it must be set.
        since: the version that had it first.
    """

    key: str
    kind: str
    default: str
    meaning: str
    since: str


class DescribedSection(Struct, frozen=True, kw_only=True):
    """
    Attributes:
        title: `learner`, or `algorithm` with its type.
        about: what it is, in a sentence.
    """

    title: str
    about: str
    keys: list[DescribedKey]


def described_sections() -> Iterator[DescribedSection]:
    """In the order of the configuration; a section whose keys depend on its `type` once for each."""
    for name, field in RunConfig.model_fields.items():
        if name in TYPED:
            for kind, section in TYPED[name].items():
                yield _described(f"{name}: {kind}", name, section)
        else:
            (section,) = (kind for kind in alternatives(field.annotation) if is_section(kind))
            yield _described(name, name, section)


def markdown() -> str:
    """The tables of docs/configuration.md."""
    parts: list[str] = []
    for section in described_sections():
        parts += [
            f"## `{section.title}`",
            "",
            section.about,
            "",
            "| key | values | default | meaning | since |",
            "| --- | --- | --- | --- | --- |",
        ]
        for key in section.keys:
            default = f"`{key.default}`" if key.default else "must be set"
            parts.append(f"| `{key.key}` | {key.kind} | {default} | {in_cell(key.meaning)} | {key.since} |")
        parts.append("")
    return "\n".join(parts)


def json_schema() -> dict[str, Any]:
    """For editors: completion, and what each key means."""
    schema = RunConfig.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "megatron_async_rlhf"
    for section in _all_sections(RunConfig):
        properties = _properties_of(schema, section)
        for name, meaning in meanings(section).items():
            if name in properties:
                properties[name]["description"] = meaning
    return schema


def _properties_of(schema: Mapping[str, Any], section: type[Section]) -> dict[str, Any]:
    if section is RunConfig:
        return schema["properties"]
    return schema["$defs"].get(section.__name__, {}).get("properties", {})


def _all_sections(section: type[Section]) -> Iterator[type[Section]]:
    yield section
    for field in section.model_fields.values():
        for kind in alternatives(field.annotation):
            if is_section(kind):
                yield from _all_sections(kind)


def _described(title: str, prefix: str, section: type[Section]) -> DescribedSection:
    return DescribedSection(title=title, about=about(section), keys=list(_keys(prefix, section)))


def _keys(prefix: str, section: type[Section]) -> Iterator[DescribedKey]:
    told = meanings(section)
    for name, field in section.model_fields.items():
        key, kinds = f"{prefix}.{name}", alternatives(field.annotation)
        below = [kind for kind in kinds if is_section(kind)]
        if below and not _is_list(field.annotation):
            yield DescribedKey(
                key=key,
                kind="section" + (" or null" if NoneType in kinds else ""),
                default=_default(field),
                meaning=told.get(name) or about(below[0]),
                since=_since(key),
            )
            for one in below:
                yield from _keys(key, one)
        else:
            unit, kind = unit_of(name), _kind(field)
            yield DescribedKey(
                key=key,
                kind=kind if unit is None or "number" not in kind else f"{kind}, {unit}",
                default=_default(field),
                meaning=told.get(name, ""),
                since=_since(key),
            )


@cache
def _versions() -> dict[str, str]:
    """By key, from the list that is kept by hand."""
    listed = yaml.safe_load((Path(__file__).parent / "since.yaml").read_text(encoding="utf-8"))
    return {key: version for version, keys in listed.items() for key in keys.split()}


def _since(key: str) -> str:
    return _versions().get(key, "?")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return ""
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Section):
        return "its defaults"
    return written(value)


def _kind(field: FieldInfo) -> str:
    if get_origin(field.annotation) is tuple:  # whose alternatives are those of its places
        return _words(field.annotation)
    words = list(dict.fromkeys(_words(kind) for kind in alternatives(field.annotation) or [Any]))
    limits = [
        f"{said} {limit:g}"
        for rule in _rules(field)
        for name, said in _LIMITS.items()
        if (limit := getattr(rule, name, None)) is not None
    ]
    return ", ".join([" or ".join(words), *dict.fromkeys(limits)])


def _rules(field: FieldInfo) -> list[Any]:
    found = list(field.metadata)
    for part in (field.annotation, *get_args(field.annotation)):
        if get_origin(part) is Annotated:
            found += [
                rule
                for given in get_args(part)[1:]
                for rule in (given.metadata if isinstance(given, FieldInfo) else [given])
            ]
    return found


def _words(kind: Any) -> str:
    origin = get_origin(kind)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind))
    if origin is list:
        return "list of " + " or ".join(_words(part) for part in alternatives(get_args(kind)[0]))
    if origin is tuple:
        return f"[{', '.join(_words(part) for part in get_args(kind))}]"
    if origin is dict:
        return "keys and values"
    if is_section(kind):
        return "sections"
    return _PLAIN.get(kind, "path" if getattr(kind, "__name__", "") == "Path" else getattr(kind, "__name__", str(kind)))


def _is_list(annotation: Any) -> bool:
    return any(get_origin(kind) is list for kind in alternatives(annotation))


def in_markdown(text: str) -> str:
    """A `<` in code stays as it is: a backslash before it would be shown there."""
    parts = text.split("`")
    parts[::2] = [plain.replace("<", "\\<") for plain in parts[::2]]
    return "`".join(parts)


def in_cell(text: str) -> str:
    """Of a table in Markdown."""
    return in_markdown(text).replace("|", "\\|")


if __name__ == "__main__":
    print(markdown())
