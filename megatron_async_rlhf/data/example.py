"""An instruction before it is tokenized."""

from typing import Any

from msgspec import Struct


class Example(Struct, frozen=True, kw_only=True):
    """One instruction with what is known about its answer.

    Attributes:
        text: the instruction as written, without the chat template.
        reference: what the verifier needs; empty when the source has no answers.
        solution: a good answer for the supervised warm start; None if unknown.
        origin: file and line, or dataset and row, for messages; empty if it was made.

    Example:
        Example(text="Reverse cat.", reference={"kind": "reverse", "answer": "tac"}, solution="tac")
    """

    text: str
    reference: dict[str, Any]
    solution: str | None = None
    origin: str = ""
