"""A conversation before it is tokenized."""

from typing import Any

from msgspec import Struct

from megatron_async_rlhf.data.conversation import text_of
from megatron_async_rlhf.types import Message


class Example(Struct, frozen=True, kw_only=True):
    """One conversation that the assistant is to answer, with what is known about the answer.

    Attributes:
        messages: the conversation; it ends with the message to answer.
        reference: what the verifier needs; empty when the source has no answers.
        solution: a good answer for the supervised warm start; None if unknown.
        origin: file and line, or dataset and row, for messages; empty if it was made.

    Example:
        Example(messages=one_turn("Reverse cat."), reference={"kind": "reverse", "answer": "tac"}, solution="tac")
    """

    messages: list[Message]
    reference: dict[str, Any]
    solution: str | None = None
    origin: str = ""

    @property
    def text(self) -> str:
        """What the user said, see `Prompt.text`."""
        return text_of(self.messages)

    @property
    def name(self) -> str:
        """See `Prompt.name`."""
        return f"{self.origin or 'a made example'} ({self.text[:40]!r})"
