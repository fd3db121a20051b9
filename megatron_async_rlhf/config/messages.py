"""Pydantic's errors as lines for people: key, value, rule, and what was probably meant."""

import re
from math import ceil
from types import NoneType
from typing import Any, get_args

from pydantic import ValidationError

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.config.schema import (
    TYPED,
    Location,
    as_written,
    choices,
    places_of,
    section_at,
    type_tag,
    types_at,
)
from megatron_async_rlhf.config.section import Section, shown
from megatron_async_rlhf.config.units import as_number
from megatron_async_rlhf.suggestions import closest

_SECTION_ERRORS = ("model_type", "model_attributes_type", "dataclass_type")
_RULES = {
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_parsing_size": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be text",
    "path_type": "must be a path",
    "list_type": "must be a list, such as [a, b]",
    "dict_type": "must be a mapping, such as {{a: b}}",
    "finite_number": "must be a finite number",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "string_pattern_mismatch": "must match {pattern}",
    "too_short": "must have at least {min_length} entries",
}
_UNION_PARTS = ("str", "int", "float", "bool")


def lines_of(error: ValidationError) -> list[str]:
    """One line for each key that is wrong."""
    lines: dict[str, str] = {}
    for item in error.errors(include_url=False):
        location, kind = item["loc"], item["type"]
        if location and location[-1] in _UNION_PARTS and len(types_at(location[:-1])) > 1:
            location, kind = location[:-1], "union"  # pydantic lists every type that it tried
        key = dotted(location)
        lines.setdefault(key or str(len(lines)), _line(key, location, kind, item))
    return list(lines.values())


def dotted(location: Location) -> str:
    """As the key is written."""
    return ".".join(map(str, as_written(location)))


def _line(key: str, location: Location, kind: str, item: Any) -> str:
    value, context = item["input"], item.get("ctx", {})
    given = f"{key} = {shown(value)}"
    match kind:
        case "extra_forbidden":
            return f"{given}: no such key; {_which_key(location, value)}"
        case "type_of_section":
            return _type_of_section(location, value)
        case "missing":
            return f"{key}: missing{_example_of(location, introduced='; for example')}"
        case "value_error":
            return _broken_rule(key, location, value, str(context["error"]))
        case "literal_error":
            return f"{given}: {_which_choice(location, value, context['expected'])}"
        case "union":
            return f"{given}: must be text, a number, or true or false"
        case _ if kind in _SECTION_ERRORS:
            return f"{given}: must be a section of keys{_example_of(location, value)}"
    return f"{given}: {_rule(kind, location, value, context) or _first_small(item['msg'])}"


def _rule(kind: str, location: Location, value: Any, context: dict[str, Any]) -> str | None:
    if kind not in _RULES:
        return None
    rule = _RULES[kind].format_map({name: _plain(limit) for name, limit in context.items()})
    if NoneType in types_at(as_written(location)):
        rule += ", or null"
    if kind == "string_type" and isinstance(value, bool | int | float):
        rule += f"; in quotes it is: '{shown(value)}'"
    if kind.endswith("_parsing") and re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?", str(value)):
        rule += f": write {str(value).replace(',', '')}"
    elif kind.endswith("_parsing") and (number := as_number(str(location[-1]), str(value))) is not None:
        rule += f", without its unit: write {ceil(number) if kind.startswith('int') else f'{number:g}'}"
    elif kind.endswith("_parsing") and len(parts := str(value).split()) > 1 and all("=" in part for part in parts[1:]):
        rule += "; every key needs a -s of its own"
    return rule


def _plain(limit: Any) -> Any:
    return int(limit) if isinstance(limit, float) and limit.is_integer() else limit


def _broken_rule(key: str, location: Location, value: Any, rule: str) -> str:
    """Of a section the rule itself names the keys that it is about, all or only the last part of them."""
    if not key:
        return rule
    if not isinstance(value, dict):
        return f"{key} = {shown(value)}: {rule}"
    first = re.match(r"[a-z_0-9]+(?=[. ])", rule)
    names = key.split(".")
    if first and first[0] == names[0]:
        return rule
    section = section_at(location)
    if first and section is not None and first[0] in section.model_fields:
        return f"{key}.{rule}"
    if first and first[0] == names[-1]:
        return ".".join([*names[:-1], rule])
    return f"{key}: {rule}"


def _which_choice(location: Location, value: Any, expected: str) -> str:
    names = [str(choice) for choice in choices(types_at(as_written(location)))]
    meant = closest(str(value), names)
    rule = f"must be {expected}"
    if NoneType in types_at(as_written(location)):
        rule += ", or null"
    return rule if meant is None else f"{rule}; did you mean {meant}?"


def _type_of_section(location: Location, value: Any) -> str:
    """An algorithm, or a reward, that does not exist, or a value in the place of the section."""
    key, types = dotted(location), TYPED[str(location[0])]
    if not isinstance(value, dict):
        nearest = closest(str(value), types) or next(iter(types))
        section = f"{{type: {nearest}}}"
        example = f"-s '{key}={section}'" if "." not in key else section
        return f"{key} = {shown(value)}: must be a section of keys; write {example}"
    given = value["type"]
    meant = closest(str(given), types)
    rule = f"{key}.type = {shown(given)}: must be one of {', '.join(types)}"
    return rule if meant is None else f"{rule}; did you mean {meant}?"


def _which_key(location: Location, value: Any) -> str:
    """For a key that does not exist."""
    name, section = str(location[-1]), section_at(location[:-1]) or RunConfig
    here = dotted(location[:-1])
    if not here and "." in name:
        first, _, rest = name.partition(".")
        return f"write it into its section, {first}: {{{rest}: {shown(value)}}}, or on the command line -s {name}={shown(value)}"
    if (meant := closest(name, section.model_fields)) is not None:
        return f"did you mean {here + '.' if here else ''}{meant}?"
    if (advice := _key_of_another_type(name, location)) is not None:
        return advice
    if elsewhere := places_of(name):
        return f"did you mean {' or '.join(elsewhere[:3])}?"
    return f"known here: {', '.join(section.model_fields)}"


def _key_of_another_type(name: str, location: Location) -> str | None:
    """For a key directly in a section with a type; None below that."""
    tag = type_tag(location)
    if tag is None or tag != len(location) - 2:
        return None
    own, key, types = str(location[tag]), dotted(location[:tag]), TYPED[str(location[0])]
    others = [kind for kind, section in types.items() if name in section.model_fields]
    whose = f"it goes with {key}.type = {' or '.join(others)}, not {own}" if others else (
        f"known here with {key}.type = {own}: {', '.join(types[own].model_fields)}"
    )  # fmt: skip
    whole = f"; to replace all of the section: -s '{key}={{type: {own}}}'"
    return whose if "." in key else whose + whole


def _example_of(location: Location, given: Any = None, introduced: str = ", such as") -> str:
    """How the section there is written, with the key in it that `given` is a value of, if there is one."""
    section, key = section_at(location), dotted(location)
    if section is None:
        return ""
    name, value = _example_key(section, given)
    off = ", or null to do without it" if NoneType in types_at(as_written(location)) else ""
    return f"{introduced} {key}: {{{name}: {value}}}, on the command line -s {key}.{name}={value}{off}"


def _example_key(section: type[Section], given: Any) -> tuple[str, str]:
    for name, field in section.model_fields.items():
        if given in get_args(field.annotation):
            return name, str(given)
    for name, field in section.model_fields.items():
        default = field.default
        if isinstance(default, str | int | float) and not isinstance(default, bool):
            return name, shown(default)
    return next(iter(section.model_fields)), "..."


def _first_small(text: str) -> str:
    return text[:1].lower() + text[1:]
