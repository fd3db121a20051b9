"""What goes over the wire between a run and its servers for a request for samples: MessagePack, numbers as they lie in memory.

Little-endian, as all machines are that vLLM runs on. No vllm import: the controller reads and writes these too.
"""

import array
from collections.abc import Iterable
from typing import Self

from msgspec import Struct

_TOKEN, _LOGPROB = "i", "d"  # of `array`: 4 and 8 bytes


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
        token_ids, logprobs: arrays, which `of` packs and `unpacked` reads.
        finish_reason: as vLLM has it; empty for none.
        versions: which weights sampled the tokens from one place to before another; None if vLLM keeps no record.
    """

    token_ids: bytes
    logprobs: bytes
    finish_reason: str
    versions: list[tuple[str, int, int]] | None

    @classmethod
    def of(
        cls,
        token_ids: Iterable[int],
        logprobs: Iterable[float],
        finish_reason: str,
        versions: list[tuple[str, int, int]] | None,
    ) -> Self:
        return cls(
            array.array(_TOKEN, token_ids).tobytes(), array.array(_LOGPROB, logprobs).tobytes(), finish_reason, versions
        )

    def unpacked(self) -> tuple[list[int], list[float]]:
        """Token ids and log-probabilities."""
        token_ids: array.array[int] = array.array(_TOKEN)
        logprobs: array.array[float] = array.array(_LOGPROB)
        token_ids.frombytes(self.token_ids)
        logprobs.frombytes(self.logprobs)
        return token_ids.tolist(), logprobs.tolist()


class PackedAnswer(Struct, frozen=True, array_like=True):
    """A completion for each sample, in order."""

    completions: list[PackedCompletion]
