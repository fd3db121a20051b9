"""Conversations as people's data has them: a text, or a list of messages."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_async_rlhf.errors import RecordError
from megatron_async_rlhf.json_lines import json_type
from megatron_async_rlhf.types import Message

# ShareGPT's names for roles, which stand in `from`, with the text in `value`.
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
# Reasons for which a record is bad.
WRONG_TYPE, NOT_UNICODE, EMPTY_PROMPT = "a wrong type", "invalid Unicode", "an empty prompt"
NOT_TEXT, NOTHING_TO_ANSWER = "a part that is not text", "no message to answer"


def one_turn(text: str) -> list[Message]:
    """The conversation that an instruction begins."""
    return [Message("user", text)]


def text_of(messages: Sequence[Message]) -> str:
    """What the user said; of several turns all, each after its role. A system message is left out of either."""
    turns = [message for message in messages if message.role != "system"]
    if len(turns) == 1:
        return turns[0].content
    return "\n\n".join(f"{turn.role}: {turn.content}" for turn in turns)


def read_conversation(value: Any, where: str) -> list[Message]:
    """A text as one user message, or a list of messages.

    A message has `role` and `content`, or ShareGPT's `from` and `value`; the content is text or a list of text parts.

    Args:
        where: file, line and field; begins every error message.

    Raises:
        RecordError: it is neither, or not valid Unicode.
    """
    if isinstance(value, str):
        return one_turn(valid_text(value, where))
    if not isinstance(value, list):
        raise RecordError(f"{where} is {json_type(value)}, neither text nor a list of messages", reason=WRONG_TYPE)
    return [_message(each, f"{where}, message {place},") for place, each in enumerate(value, start=1)]


def split_answer(messages: Sequence[Message], where: str) -> tuple[list[Message], str | None]:
    """The conversation before its last assistant turn, which the assistant is to answer, and that turn if it is there.

    Raises:
        RecordError: no user turn is left to answer.
    """
    prompt, answer = list(messages), None
    if prompt and prompt[-1].role == "assistant":
        answer = prompt.pop().content
    if not prompt:
        raise RecordError(
            f"{where} has no message to answer; remove the record or fill it in", reason=NOTHING_TO_ANSWER
        )
    if prompt[-1].role in ("system", "assistant"):
        raise RecordError(
            f"{where}: the assistant is to answer a message of the role {prompt[-1].role!r}; end the conversation with a "
            "user's message, or with that and the assistant's answer",
            reason=NOTHING_TO_ANSWER,
        )
    if not prompt[-1].content.strip():
        raise RecordError(f"{where} is empty; remove the record or fill it in", reason=EMPTY_PROMPT)
    return prompt, answer


def valid_text(text: str, where: str) -> str:
    """The text itself.

    Raises:
        RecordError: it is not valid Unicode.
    """
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can escape half of a surrogate pair
        raise RecordError(f"{where} is not valid Unicode (a lone surrogate); correct it", reason=NOT_UNICODE) from None
    return text


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise RecordError(f"{where} is {json_type(value)}, not a mapping with `role` and `content`", reason=WRONG_TYPE)
    # A table of both kinds has all four, and leaves two empty.
    is_sharegpt = "from" in value and "value" in value and value.get("role") is None
    if "role" in value and "content" in value and not is_sharegpt:
        role, content = value["role"], value["content"]
    elif is_sharegpt:
        role, content = value["from"], value["value"]
        role = _SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
    else:
        raise RecordError(
            f"{where} has {', '.join(map(repr, value)) or 'nothing'}, and not `role` and `content`", reason=WRONG_TYPE
        )
    if not isinstance(role, str) or not role:
        raise RecordError(
            f"{where} has {json_type(role)} as its role; give a name such as user or assistant", reason=WRONG_TYPE
        )
    if isinstance(content, list):
        content = "".join(_text_part(part, where) for part in content)
    if not isinstance(content, str):
        raise RecordError(
            f"{where} has {json_type(content)} as its content, neither text nor a list of text parts", reason=WRONG_TYPE
        )
    return Message(valid_text(role, where), valid_text(content, where))


def _text_part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, Mapping) else None
    raise RecordError(
        f"{where} has a part of the content that is {json_type(part) if kind is None else f'of the type {kind!r}'}; only "
        "text can be trained on: remove the record",
        reason=WRONG_TYPE if kind is None else NOT_TEXT,
    )
