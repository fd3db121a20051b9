"""One vLLM server of a reward model: token ids in, a score for each sequence out."""

import math
from collections.abc import Sequence

from msgspec import Struct

from megatron_async_rlhf.errors import GeneratorError
from megatron_async_rlhf.serving.connection import CLASSIFY, NO_LIMIT, Connection
from megatron_async_rlhf.serving.silence import StallDetector

PLACES = 64  # requests to one server at once; others wait, in order
_NOT_FINITE = "Out of range float values"  # why vLLM cannot write a NaN down as JSON


class _Item(Struct):
    """Of one sequence, as vLLM tells of it; without an activation `probs` are the logits."""

    index: int
    probs: list[float | None]


class _Answer(Struct):
    data: list[_Item]


class RewardServer:
    """One server. Its HTTP front may answer while its engine hangs, so it is judged by the scores it gives alone."""

    def __init__(self, name: str, url: str, *, request_timeout_s: float, section: str, ours: bool = True) -> None:
        """
        Args:
            section: of the configuration, where its timeouts stand.
            ours: the run has started it.
        """
        self.name = name
        self._timeout_s = request_timeout_s
        self._silence = StallDetector(name, request_timeout_s, section=section)
        self._server = Connection(name, url, request_timeout_s, PLACES, section=section, ours=ours)

    async def score(self, sequences: Sequence[list[int]]) -> list[float]:
        """The model's logit for each sequence of token ids, in float32 and as it is: no sigmoid, no scaling.

        Raises:
            GeneratorGoneError: the server ended or hangs, or was given up.
            GeneratorError: it refused, or an answer is no finite number.
        """
        return await self._silence.wait(self._score(sequences, NO_LIMIT))

    async def probe(self) -> None:
        """Return once it has scored a sequence of one token.

        Raises:
            GeneratorSilentError: it did not within `request_timeout_s`.
            GeneratorError: nobody is there, it is still starting, or no server of such a model.
        """
        await self._score([[0]], self._timeout_s)

    def give_up(self) -> None:
        """All requests under way raise GeneratorGoneError."""
        self._silence.give_up()

    async def close(self) -> None:
        await self._server.close()

    async def _score(self, sequences: Sequence[list[int]], limit_s: float) -> list[float]:
        body = {"input": list(sequences), "use_activation": False}
        try:
            answer = await self._server.post(CLASSIFY, body, limit_s, _Answer)
        except GeneratorError as error:
            if _NOT_FINITE in str(error):
                raise GeneratorError(f"{self.name}: gave a score that is no finite number") from None
            raise
        items = sorted(answer.data, key=lambda item: item.index)
        if [item.index for item in items] != list(range(len(sequences))):
            raise GeneratorError(f"{self.name}: gave {len(items)} scores for {len(sequences)} completions")
        return [self._number(item) for item in items]

    def _number(self, item: _Item) -> float:
        if len(item.probs) != 1:
            raise GeneratorError(
                f"{self.name}: gave {len(item.probs)} numbers for a completion; a reward model has one label"
            )
        (score,) = item.probs
        if score is None or not math.isfinite(score):
            raise GeneratorError(
                f"{self.name}: gave {score} for completion {item.index + 1}, which is no finite number"
            )
        return score
