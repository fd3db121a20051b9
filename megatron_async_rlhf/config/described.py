"""What the keys of a section mean: the comments beside them in the source, which are written once and read by people too."""

import inspect
import io
import tokenize
from functools import cache
from textwrap import dedent

from megatron_async_rlhf.config.section import Section


def about(section: type[Section]) -> str:
    """The first paragraph of its docstring."""
    return " ".join((section.__doc__ or "").split("\n\n")[0].split())


@cache
def meanings(section: type[Section]) -> dict[str, str]:
    """By key, of this class and its bases; keys whose names say it all are left out.

    A comment is the one at the end of the key's lines, or else the lines of comment right above it.
    """
    found: dict[str, str] = {}
    for base in reversed(section.__mro__):
        if isinstance(base, type) and issubclass(base, Section) and base is not Section:
            found |= _of_class(base)
    return {name: found[name] for name in section.model_fields if name in found}


def _of_class(section: type[Section]) -> dict[str, str]:
    lines, first = inspect.getsourcelines(section)
    own = {name for name in section.__annotations__ if name in section.model_fields}
    found: dict[str, str] = {}
    above: list[str] = []
    for line in _statements(dedent("".join(lines))):
        if line.name is None and not line.code:
            above = [*above, line.comment] if line.comment else []
            continue
        if line.name in own and (meaning := line.comment or " ".join(above)):
            found[line.name] = meaning
        above = []
    return found


class _Statement:
    """A logical line: the name it annotates, whether it has code, and its comment."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.code: list[str] = []
        self.comment = ""


def _statements(source: str) -> list[_Statement]:
    statements = [_Statement()]
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        now = statements[-1]
        if token.type == tokenize.COMMENT:
            now.comment = token.string.lstrip("#").strip()
            if now.comment.endswith(("noqa", "fmt: skip")):
                now.comment = ""
        elif token.type in (tokenize.NEWLINE, tokenize.NL):
            if token.type == tokenize.NEWLINE or not now.code:
                statements.append(_Statement())
        elif token.type not in (tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER):
            now.code.append(token.string)
            if len(now.code) == 2 and token.string == ":" and now.code[0].isidentifier():
                now.name = now.code[0]
    return statements
