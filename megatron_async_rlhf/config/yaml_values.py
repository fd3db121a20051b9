"""YAML as people mean it: from text to plain values, knowing which type the configuration expects at each key.

YAML 1.1 silently makes other things of what is written: `off` becomes false, 2026-11-26 a date, 010 the number 8, 12:30 the
number 750; of a key that is there twice the last one wins. Here a value that must be text stays as written, 1e-6 is a number
where one is expected, and what remains ambiguous is an error that names line and key.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from megatron_async_rlhf.config.schema import Location, choices, is_number, is_section, is_text, types_at
from megatron_async_rlhf.errors import ConfigError

_TAG = "tag:yaml.org,2002:"
_TEXT_TAGS = {f"{_TAG}{name}" for name in ("str", "timestamp", "value", "merge")}
_TRUE = {"yes", "true", "on"}
_POWER = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+")
_OCTAL = re.compile(r"[-+]?0[0-7_]+")
_NO_SPACE = re.compile(r"(?P<key>[A-Za-z_]\w*):(?P<value>[^\s:].*)")
_VARIABLE = re.compile(r"\$\{?[A-Za-z_][\w.:]*\}?")
_MOST_VALUES = 20_000  # of one file: aliases of aliases can stand for billions


def parse_value(text: str, location: Location = ()) -> Any:
    """The value written in `text`, as it is meant at `location`; None for no text.

    Raises:
        ConfigError: the text is no YAML, or ambiguous; begins with the line.
    """
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {_syntax(error, text)}") from None
    return None if node is None else _Values().of(node, tuple(location))


def comment_in(text: str) -> str:
    """What YAML would leave out of a value because it takes it for a comment; empty if there is nothing."""
    node = yaml.SafeLoader(text).get_single_node()
    return "" if node is None else text[node.end_mark.index :].strip()


class _Values:
    """Makes plain values of one document's nodes. An alias becomes a copy, so that overrides change one place only."""

    def __init__(self) -> None:
        self._made = 0
        self._inside: list[yaml.Node] = []

    def of(self, node: yaml.Node, location: tuple) -> Any:
        self._made += 1
        if node in self._inside:
            raise ConfigError(f"{_line(node)}: an alias that is inside of what it stands for; write it out")
        if self._made > _MOST_VALUES:
            raise ConfigError(f"{_line(node)}: more than {_MOST_VALUES} values; aliases that hold aliases?")
        self._inside.append(node)
        try:
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, location)
            if isinstance(node, yaml.SequenceNode):
                return [self.of(child, (*location, place)) for place, child in enumerate(node.value)]
            assert isinstance(node, yaml.ScalarNode)
            return _scalar(node, location)
        finally:
            self._inside.pop()

    def _mapping(self, node: yaml.MappingNode, location: tuple) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        own: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            key = _key(key_node, value_node, location)
            if key in lines:
                raise ConfigError(
                    f"{_line(key_node)}: {_dotted((*location, key))} is there a second time, after line {lines[key]}; "
                    "put both together, or remove one"
                )
            lines[key] = key_node.start_mark.line + 1
            if key_node.tag == f"{_TAG}merge":
                merged = self._merged(value_node, location)
                continue
            own[key] = self.of(value_node, (*location, key))
        return merged | own

    def _merged(self, node: yaml.Node, location: tuple) -> dict[str, Any]:
        """Of `<<`: a mapping, or several, of which the first that has a key counts."""
        parts = node.value if isinstance(node, yaml.SequenceNode) else [node]
        merged: dict[str, Any] = {}
        for part in reversed(parts):
            if not isinstance(part, yaml.MappingNode):
                raise ConfigError(f"{_line(part)}: `<<` takes a mapping, or a list of them")
            merged |= self.of(part, location)
        return merged


def _key(node: yaml.Node, value: yaml.Node, location: tuple) -> str:
    """The text of a key, whatever YAML makes of it (`on`, 5, 2026-11-26)."""
    if not isinstance(node, yaml.ScalarNode) or not node.value.strip():
        raise ConfigError(f"{_line(node)}: a key must be text; is this a template that nobody filled in?")
    unspaced = _NO_SPACE.fullmatch(node.value)
    if unspaced and node.style is None and isinstance(value, yaml.ScalarNode) and value.value == "":
        where = f" in {_dotted(location)}" if location else ""
        raise ConfigError(
            f"{_line(node)}: {node.value}{where} lacks the space after the colon: write "
            f"{unspaced['key']}: {unspaced['value']}"
        )
    return node.value


def _scalar(node: yaml.ScalarNode, location: tuple) -> Any:
    text, kind, types = node.value, node.tag.removeprefix(_TAG), types_at(location)
    if kind == "null":
        is_empty_section = any(map(is_section, types)) and type(None) not in types
        return {} if is_empty_section else None
    if node.tag in _TEXT_TAGS:
        if any(map(is_section, types)) and (unspaced := _NO_SPACE.fullmatch(text)):
            raise ConfigError(
                f"{_line(node)}: {_dotted(location)} = {text} lacks the space after the colon: write "
                f"{unspaced['key']}: {unspaced['value']}"
            )
        if Path in types and location[0] != "launch" and (variable := _VARIABLE.search(text)):
            raise ConfigError(
                f"{_line(node)}: {_dotted(location)} = {text}: {variable[0]} is not filled in here; write the path itself"
            )
        return float(text.replace("_", "")) if is_number(types) and _POWER.fullmatch(text) else text
    if kind in ("bool", "int", "float"):
        if is_text(types) or text in choices(types):
            return text
        return text.lower() in _TRUE if kind == "bool" else _number(node, kind, location)
    raise ConfigError(f"{_line(node)}: the tag {node.tag} means nothing here; remove it")


def _number(node: yaml.ScalarNode, kind: str, location: tuple) -> int | float:
    text = node.value.replace("_", "")
    if ":" in text:
        raise ConfigError(
            f"{_line(node)}: {_dotted(location)} = {text}: YAML takes this for a number in base 60; write it as one number, "
            "or in quotes"
        )
    if kind == "int":
        if _OCTAL.fullmatch(text):
            raise ConfigError(
                f"{_line(node)}: {_dotted(location)} = {text}: YAML takes a number with a leading 0 for octal; write "
                f"{int(text)} or {int(text, 8)}"
            )
        return int(text, 0)
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


def _line(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"


def _dotted(location: tuple) -> str:
    return ".".join(map(str, location))


def _syntax(error: yaml.YAMLError, text: str) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if isinstance(error, yaml.reader.ReaderError):
        number = text.count("\n", 0, error.position) + 1
        return f"line {number}: the character {error.character:#04x} cannot be in it"
    if mark is None or problem is None:
        return " ".join(str(error).split())
    line = f"line {mark.line + 1}"
    if "but found another document" in problem:
        return f"{line}: a second document begins with ---; keep one"
    if "'\\t'" in problem or "\t" in _text_of_line(text, mark.line).partition("#")[0]:
        return f"{line}: there is a tab; indent with spaces"
    advice = {
        "mapping values are not allowed here": "; put a value with a colon in quotes, and check the indentation",
        "could not find expected ':'": "; a key needs a colon and a space behind it",
        "that cannot start any token": "; put the value in quotes",
        "found undefined alias": "; put a value that begins with * in quotes",
        "found unexpected end of stream": "; a quote is opened and not closed",
        "expected alphabetic or numeric character": "; put a value that begins with * or & in quotes",
    }
    return f"{line}: {problem}{next((way for what, way in advice.items() if what in problem), '')}"


def _text_of_line(text: str, number: int) -> str:
    lines = text.split("\n")
    return lines[number] if number < len(lines) else ""
