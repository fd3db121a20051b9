"""A Hugging Face chat template, rendered the way Transformers renders it but without Transformers."""

import json
import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_async_rlhf.errors import DataError
from megatron_async_rlhf.types import Message

# Private-use characters: no template contains them, so they mark where a message's text ends up.
_MARK = "\ue000message {}\ue001"
_MARKED = re.compile(_MARK.format(r"(\d+)"))


class ChatTemplate:
    """A conversation as the model reads it: up to the cue for the assistant to answer, or with the answer."""

    def __init__(self, source: str, variables: dict[str, str], *, now: datetime, where: str) -> None:
        """Compile `source`; `variables` are the special tokens by name, `where` begins every error message.

        Args:
            now: what a template that prints today's date takes for now.

        Raises:
            DataError: the template does not compile, fails to render, or leaves the user's message out.
        """
        self._variables = variables
        self._where = where
        try:
            self._template = _environment(now).from_string(source)
        except jinja2.TemplateError as error:
            raise DataError(f"{where}: the chat template does not compile ({_first_line(error)}); correct it") from None
        self.parts(("user",))  # see that it works

    def parts(self, roles: tuple[str, ...], *, is_answered: bool = False) -> list[str | int]:
        """What the template writes around messages of these roles, and in their places their numbers.

        Raises:
            DataError: it leaves one of them out, or does what `render` says.
        """
        messages = [Message(role, _MARK.format(place)) for place, role in enumerate(roles)]
        marked = self.render(messages, is_answered=is_answered)
        pieces = _MARKED.split(marked)
        parts = [int(piece) if place % 2 else piece for place, piece in enumerate(pieces)]
        for place, role in enumerate(roles):
            if place not in parts:
                which = "the user's message" if len(roles) == 1 else f"message {place + 1} of {len(roles)} ({role})"
                raise DataError(f"{self._where}: the chat template leaves {which} out; correct it")
        return parts

    def render(self, messages: Sequence[Message], *, is_answered: bool = False) -> str:
        """The templated conversation as text.

        Args:
            is_answered: it ends with the assistant's answer, and not with the cue for one.

        Raises:
            DataError: the template itself refuses or fails.
        """
        conversation = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self._template.render(
                messages=conversation,
                tools=None,
                documents=None,
                add_generation_prompt=not is_answered,
                **self._variables,
            )
        except Exception as error:  # templates are programs and raise anything
            roles = ", ".join(message.role for message in messages)
            what = "one user message" if roles == "user" else f"messages of the roles {roles}"
            raise DataError(
                f"{self._where}: the chat template fails on {what} ({_first_line(error)}); correct it"
            ) from None


class _GenerationBlock(Extension):
    """`{% generation %}` marks what the assistant said; for a prompt it only has to be passed through.

    As in Transformers it is a block of its own: what is set inside is not set outside.
    """

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_pass_through"), [], [], body).set_lineno(line)

    def _pass_through(self, caller: jinja2.runtime.Macro) -> str:
        return caller()


def _environment(now: datetime) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: now.strftime(format)
    return environment


def _to_json(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters, which a model has never seen.
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
