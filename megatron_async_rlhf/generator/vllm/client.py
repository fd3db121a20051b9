"""Talks to one vLLM server: sampling, pausing, and the generator's half of a weight push. No vllm import.

    sample ──> /async_rlhf/sample (routes) ────────────────────────> completions, interrupted or not
                     ▲ begun: continues after these tokens ────────────────────┘
    pause(keep | wait | abort) ──> receive_weights(recompute | not) ──> resume

What each token was sampled with is vLLM's own record (`weight_versions`), so it is right for a completion that lives
through any number of updates.
"""

import asyncio
from typing import Any

from msgspec import Struct, structs

from megatron_async_rlhf.data.tokenizer import Tokenizer
from megatron_async_rlhf.errors import GeneratorError, GeneratorGoneError
from megatron_async_rlhf.generator.protocol import Pause, SamplingRequest
from megatron_async_rlhf.generator.seeds import request_seed
from megatron_async_rlhf.generator.vllm.packed import PackedAnswer, PackedCompletion, PackedRequest
from megatron_async_rlhf.serving.connection import NO_LIMIT, PAUSE, RECEIVE, SAMPLE, Connection
from megatron_async_rlhf.serving.silence import StallDetector
from megatron_async_rlhf.types import Completion

_NOTHING = Completion(token_ids=[], logprobs=[], versions=[], finished=False, text="")


class _Entry(Struct):
    """Of one token."""

    logprob: float


class _ScoredPrompt(Struct):
    """By token id, as text; nothing of the first token, which follows none."""

    prompt_logprobs: list[dict[str, _Entry] | None] | None = None


class _Model(Struct):
    id: str


class _Models(Struct):
    data: list[_Model]


class VLLMGenerator:
    """One server.

    `version` is the policy version of the weights it was last given; -1 before the first push, after one that failed,
    and once its server is known to be gone: whatever is started in its place has no weights yet.
    """

    def __init__(
        self,
        name: str,
        url: str,
        *,
        tokenizer: Tokenizer,
        tensor_parallel: int,
        request_timeout_s: float,
        probe_timeout_s: float,
        places: int = 2**16,
        serves: str | None = None,
    ) -> None:
        """
        Args:
            serves: the model that the server has loaded itself, by the name it has there; None: its weights are pushed.
        """
        self.name = name
        self._serves = serves
        self.version = -1
        self.tensor_parallel = tensor_parallel
        self._tokenizer = tokenizer
        self._timeout_s = request_timeout_s
        self._probe_timeout_s = probe_timeout_s
        self._under_way = 0  # requests
        self._silence = StallDetector(name, request_timeout_s)
        self._server = Connection(name, url, request_timeout_s, places)

    async def sample(self, request: SamplingRequest) -> list[Completion]:
        """`request.samples` completions; their text has no special tokens, nor the one that ended it.

        Raises:
            GeneratorGoneError: the server ended or hangs, or was started again and has no weights.
        """
        begun = request.begun or _NOTHING
        left = request.max_new_tokens - len(begun.token_ids)
        if request.begun is not None and request.samples != 1:
            raise GeneratorError(
                f"{self.name}: only one sample can continue from what was begun, not {request.samples}"
            )
        if begun.finished or left <= 0:
            return [structs.replace(begun, interrupted=False)]
        packed = PackedRequest(
            token_ids=request.prompt.token_ids + begun.token_ids,
            samples=request.samples,
            seed=continued_seed(request.seed, len(begun.token_ids)),
            temperature=request.temperature,
            max_tokens=left,
            stop_token_ids=[self._tokenizer.eos_token_id],
            order=request.order,
        )
        version = self.version  # a push may begin before an answer that it has cut off is read
        self._under_way += 1
        try:
            answer = await self._silence.wait(self._server.post_packed(SAMPLE, packed, PackedAnswer))
        except GeneratorGoneError:
            self.version = -1
            raise
        finally:
            self._under_way -= 1
        if len(answer.completions) != request.samples:
            raise GeneratorError(f"{self.name}: asked for {request.samples} completions, got {len(answer.completions)}")
        return [self._continued(begun, completion, version) for completion in answer.completions]

    async def logprobs(self, token_ids: list[int], start: int) -> list[float]:
        """Log-probability of each token from position `start` on, given all before it, at temperature 1.

        Args:
            start: at least 1. The context must have room for one more token.
        """
        body = {
            "token_ids": token_ids,
            "sampling_params": {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0, "detokenize": False},
        }
        asking = self._ask("/inference/v1/generate", body, timeout_s=NO_LIMIT, answer=_ScoredPrompt)
        rows = (await self._silence.wait(asking)).prompt_logprobs or []
        if len(rows) != len(token_ids) or any(row is None for row in rows[start:]):
            raise GeneratorError(f"{self.name}: {len(rows)} log-probabilities came for {len(token_ids)} tokens")
        return [rows[place][str(token_ids[place])].logprob for place in range(start, len(rows))]

    def _continued(self, begun: Completion, more: PackedCompletion, version: int) -> Completion:
        """
        Args:
            version: of the weights when the request began.
        """
        token_ids, logprobs = more.unpacked()
        if len(logprobs) != len(token_ids):
            raise GeneratorError(f"{self.name}: {len(token_ids)} tokens came with {len(logprobs)} log-probabilities")
        whole = begun.token_ids + token_ids
        # Not by the tokenizer's end-of-sequence token: vLLM also stops at those the model's own config names.
        finished = more.finish_reason == "stop"
        return Completion(
            token_ids=whole,
            logprobs=begun.logprobs + logprobs,
            versions=begun.versions + self._versions(more.versions, len(token_ids), version),
            finished=finished,
            text=self._tokenizer.decode(whole[:-1] if finished else whole),
            interrupted=more.finish_reason == "abort",
        )

    def _versions(self, spans: list[tuple[str, int, int]] | None, length: int, version: int) -> list[int]:
        """Version per token, from vLLM's own record of which weights sampled what."""
        if self._serves is not None:  # one version, the model's own
            return [0] * length
        if spans is None:  # vLLM before 0.30 keeps no record; its weights only change while nothing runs
            return [version] * length
        versions: list[int] = []
        for label, start, end in spans:
            if not label.isdecimal():
                raise self._started_again()
            versions += [int(label)] * (end - start)
        if len(versions) != length:
            raise GeneratorError(f"{self.name}: weight versions cover {len(versions)} of {length} tokens")
        return versions

    async def pause(self, how: Pause = "keep", *, clear_cache: bool = True) -> None:
        """Stop the engine; what is asked from now on is queued until `resume`.

        Requests under way freeze with their cache (`keep`), run to their end first (`wait`: this takes as long as
        they do), or end here and return what they have, `interrupted` (`abort`).

        Args:
            clear_cache: with nobody left to use it the cache is emptied: what comes next must not depend on what went
                before. A pause for a push leaves that to `receive_weights`: it costs calls of all workers.

        Raises:
            GeneratorGoneError: as `sample`; a push must not begin with a server that is not the one that was connected.
        """
        clear_cache = clear_cache and (how != "keep" or not self._under_way)
        answer = await self._ask(f"{PAUSE}?mode={how}&clear_cache={_text(clear_cache)}")
        self._silence.pause()
        if self.version >= 0 and answer["weight_version"] not in (None, str(self.version)):
            raise self._started_again()

    def _started_again(self) -> GeneratorGoneError:
        self.version = -1
        return GeneratorGoneError(f"{self.name}: its server was started again and has no weights yet")

    async def resume(self) -> None:
        await self._ask("/resume")
        self._silence.resume()

    def give_up(self) -> None:
        self._silence.give_up()

    async def wait_queued(self, count: int) -> None:
        """Return once the server has taken in `count` requests, or all that have a place; they run after `resume`.

        Raises:
            GeneratorGoneError: it does not take them in, or was given up.
        """
        count = min(count, self._server.places)
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._silence.unless_given_up(self._has_queued(count))
        except TimeoutError:
            raise GeneratorGoneError(
                f"{self.name}: {count} requests were not queued within {self._timeout_s:g} s"
            ) from None

    async def _has_queued(self, count: int) -> None:
        while (await self._server.get("/load"))["server_load"] < count:
            await asyncio.sleep(0.005)

    async def join_transfer(self, info: dict[str, Any], *, timeout_s: float) -> None:
        """Rendezvous of this server's workers with the learner; returns when all ranks have met.

        Args:
            info: the fields of the sink's `SinkInit`.
        """
        await self._ask("/init_weight_transfer_engine", {"init_info": info}, timeout_s=timeout_s)

    async def receive_weights(self, *, version: int, verify: bool, recompute: bool = True) -> None:
        """The server's half of a push. The engine must be paused, and stays so.

        Returns when every worker holds the weights and, if `verify`, the learner has found them equal to its own. It
        may take as long as weights keep moving: the workers themselves give up when nothing moves any more.

        Args:
            recompute: empty the cache: frozen requests compute theirs anew when they continue, and nobody finds a block
                that older weights made. Otherwise frozen requests, if there are any, continue with the old one; the server
                must have been started without a prefix cache then (`server_command` does, for in-flight updates that
                keep).

        Raises:
            GeneratorError: the push failed; `version` is -1 then, until one succeeds: parts of two versions may be mixed.
        """
        self.version = -1
        how = f"verify={_text(verify)}&clear_cache={_text(recompute or not self._under_way)}"
        await self._ask(f"{RECEIVE}?version={version}&{how}", timeout_s=NO_LIMIT)
        self.version = version

    async def probe(self) -> None:
        """Return once engine and workers have answered a call that takes no time, which they do while paused too.

        A round trip through all of them: `/health` stays 200 when the engine hangs.

        Raises:
            GeneratorSilentError: they did not within `probe_timeout_s`.
            GeneratorError: nobody is there, or the server is still starting.
        """
        await self._server.post("/collective_rpc", {"method": "check_health"}, self._probe_timeout_s)

    async def is_ready(self) -> bool:
        """Whether `probe` returns; False while the server is still starting, or another one has its address yet."""
        try:
            if self._serves is not None:
                models = await self._server.get("/v1/models", _Models)
                if [model.id for model in models.data] != [self._serves]:
                    return False
            await self.probe()
        except GeneratorError:
            return False
        return True

    async def wait_until_ready(self, limit_s: float) -> None:
        """
        Raises:
            GeneratorError: it was not within the limit, `generator.start_timeout_s`.
        """
        try:
            async with asyncio.timeout(limit_s):
                while not await self.is_ready():
                    await asyncio.sleep(0.25)
        except TimeoutError:
            raise GeneratorError(
                f"{self.name} was not ready within {limit_s:g} s; see logs/{self.name}.log, or raise "
                "generator.start_timeout_s"
            ) from None

    async def close(self) -> None:
        await self._server.close()

    async def _ask(
        self, path: str, body: dict | None = None, timeout_s: float | None = None, answer: Any = dict[str, Any]
    ) -> Any:
        try:
            return await self._server.post(path, body, timeout_s, answer)
        except GeneratorGoneError:
            self.version = -1
            raise


def _text(value: bool) -> str:
    """As it stands in a query."""
    return str(value).lower()


def continued_seed(seed: int, tokens: int) -> int:
    """Of the sampler that continues after `tokens` tokens: the same for the same two numbers, its noise unlike the first part's.

    vLLM draws a request's noise from a generator of its own that starts at the seed; with the seed as it was the second
    part would meet the first part's noise again.
    """
    return request_seed(seed, tokens) if tokens else seed
