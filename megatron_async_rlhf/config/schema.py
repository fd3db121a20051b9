"""What the configuration's classes expect at a key: the types of its values, the names beside it."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from megatron_async_rlhf.config.algorithms import SECTIONS
from megatron_async_rlhf.config.rewards import REWARDS
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.config.section import Section

Location = Sequence[str | int]  # names of keys and places in lists, from the root
# Sections whose keys depend on their `type`, and the class of each type.
TYPED: dict[str, Mapping[str, type[Section]]] = {"algorithm": SECTIONS, "reward": REWARDS}


def types_at(location: Location) -> list[Any]:
    """The types a value there may have, without `Annotated` and unions; empty where anything goes, or nothing does.

    A sweep's axes are keys of the whole configuration: (sweep, axes, layout, `learner.ranks`, 0) is learner.ranks.
    """
    if tuple(location[:2]) == ("sweep", "axes") and len(location) > 4:
        # Below a label there are keys with their values; without labels, a key with a list of values.
        key = location[3] if isinstance(location[4], int) else location[4]
        return types_at((*str(key).split("."), *location[5:]))
    return _nested(RunConfig, location)


def section_at(location: Location) -> type[Section] | None:
    """The class of the section there; an algorithm's or a reward's is chosen by its type, which pydantic adds to the
    location."""
    tag = type_tag(location)
    if tag is None:
        types = types_at(as_written(location))
    else:
        types = _nested(TYPED[str(location[0])][str(location[tag])], location[tag + 1 :])
    return next((kind for kind in types if is_section(kind)), None)


def type_tag(location: Location) -> int | None:
    """Where a location of pydantic's has the type of the section that it is in, if that is one of those with a type."""
    tag = 3 if _is_in_list(location) else 1
    return tag if len(location) > tag and location[tag] in TYPED.get(str(location[0]), ()) else None


def as_written(location: Location) -> tuple[str | int, ...]:
    """Without what pydantic adds: the type of an algorithm or a reward, and the word `list`."""
    added = {type_tag(location), 1 if _is_in_list(location) else None}
    return tuple(part for place, part in enumerate(location) if place not in added)


def _is_in_list(location: Location) -> bool:
    return tuple(location[:2]) == ("reward", "list")


def is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def is_text(types: Sequence[Any]) -> bool:
    """Whether a value there can be nothing but text (or null), so that it needs no quotes."""
    return bool(types) and all(kind in (str, Path, NoneType) for kind in types) and set(types) != {NoneType}


def is_number(types: Sequence[Any]) -> bool:
    """Whether a value there can be nothing but a number (or null)."""
    return any(kind in (int, float) for kind in types) and all(kind in (int, float, NoneType) for kind in types)


def choices(types: Sequence[Any]) -> list[Any]:
    """The values of an enumeration."""
    return [value for kind in types if get_origin(kind) is Literal for value in get_args(kind)]


def places_of(name: str) -> list[str]:
    """Every `section.key` of that name, those of algorithms once; first in the sections that every run has."""
    found = dict.fromkeys(key for key in _all_keys(RunConfig, "") if key.rpartition(".")[2] == name)
    fields = RunConfig.model_fields
    return sorted(found, key=lambda key: fields[key.partition(".")[0]].get_default(call_default_factory=True) is None)


def _all_keys(section: type[Section], prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        below = [kind for kind in alternatives(field.annotation) if is_section(kind)]
        yield f"{prefix}{name}"
        for kind in below:
            yield from _all_keys(kind, f"{prefix}{name}.")


def _nested(section: type[Section], location: Location) -> list[Any]:
    types: list[Any] = [section]
    for part in location:
        types = [found for kind in types for found in _below(kind, part)]
    return types


def _below(kind: Any, part: str | int) -> list[Any]:
    if is_section(kind):
        field = kind.model_fields.get(part)
        return alternatives(field.annotation) if field is not None else []
    if get_origin(kind) is (list if isinstance(part, int) else dict):
        return alternatives(get_args(kind)[-1])
    return []


def alternatives(annotation: Any) -> list[Any]:
    """The types of an annotation, without `Annotated` and unions; empty where anything goes."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return alternatives(get_args(annotation)[0])
    if origin in (None, list, dict, Literal):
        return [] if annotation is Any else [annotation]
    return [found for part in get_args(annotation) for found in alternatives(part)]
