"""Conversations written as one text, with `Human:` and `Assistant:` before each turn, as Anthropic's HH data has them."""

import re
from os.path import commonprefix

from megatron_async_rlhf.types import Message

ASSISTANT = "\n\nAssistant:"
_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def is_transcript(text: str) -> bool:
    """Whether a text begins with a turn of the human and continues to one of the assistant."""
    return text.lstrip().startswith("Human:") and ASSISTANT in text


def read_transcript(text: str) -> list[Message]:
    """Its turns, without the space around them; what is before the first one counts as nothing."""
    parts = _TURN.split("\n\n" + text.lstrip())
    return [Message(_ROLES[role], content.strip()) for role, content in zip(parts[1::2], parts[2::2], strict=True)]


def split_transcripts(one: str, other: str) -> tuple[str, str, str]:
    """What two transcripts share up to their last common `Assistant:`, and what follows in each."""
    shared = len(commonprefix([one, other]))
    place = one.rfind(ASSISTANT, 0, shared)
    end = 0 if place < 0 else place + len(ASSISTANT)
    return one[:end], one[end:], other[end:]
