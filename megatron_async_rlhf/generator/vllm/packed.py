"""What goes over the wire between a run and its servers for a request for samples: MessagePack, numbers as they lie in memory.

Little-endian, as all machines are that vLLM runs on. No vllm import: the controller reads and writes these too.
"""

import array

from msgspec import Struct

TOKEN, LOGPROB = "i", "d"  # of `array`: 4 and 8 bytes


class PackedRequest(Struct, frozen=True, array_like=True):
    """Samples of one prompt; `order` is vLLM's priority."""

    token_ids: list[int]
    samples: int
    seed: int
    temperature: float
    max_tokens: int
    stop_token_ids: list[int]
    order: int


class PackedCompletion(Struct, frozen=True, array_like=True):
    """
    Attributes:
        token_ids, logprobs: arrays of `TOKEN` and `LOGPROB`.
        finish_reason: as vLLM has it; empty for none.
        versions: which weights sampled the tokens from one place to before another; None if vLLM keeps no record.
    """

    token_ids: bytes
    logprobs: bytes
    finish_reason: str
    versions: list[tuple[str, int, int]] | None


class PackedAnswer(Struct, frozen=True, array_like=True):
    """A completion for each sample, in order."""

    completions: list[PackedCompletion]


def pack(kind: str, numbers: list) -> bytes:
    return array.array(kind, numbers).tobytes()


def unpack(kind: str, content: bytes) -> list:
    numbers = array.array(kind)
    numbers.frombytes(content)
    return numbers.tolist()
