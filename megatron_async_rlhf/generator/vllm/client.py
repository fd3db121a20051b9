"""Talks to one vLLM server over HTTP: sampling, pausing, and the generator's half of a weight push. No vllm import."""

import asyncio
from typing import Any

import aiohttp
import msgspec

from megatron_async_rlhf.data.tokenizer import Tokenizer
from megatron_async_rlhf.errors import GeneratorError, GeneratorGoneError
from megatron_async_rlhf.generator.protocol import Pause, SamplingRequest
from megatron_async_rlhf.types import Completion

_NO_LIMIT = 0.0


class VLLMGenerator:
    """One server. `version` is the policy version of the weights it was last given; -1 before the first push."""

    def __init__(
        self, name: str, url: str, *, tokenizer: Tokenizer, tensor_parallel: int, request_timeout_s: float
    ) -> None:
        self.name = name
        self.version = -1
        self.tensor_parallel = tensor_parallel
        self._tokenizer = tokenizer
        self._timeout_s = request_timeout_s
        # As many connections as requests, so that all can be queued at once. Idle ones are given up long before the
        # server closes them (`server_environment`): a request sent on a connection that is just being closed would
        # fail although both sides are well.
        self._http = aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=5.0))

    async def sample(self, request: SamplingRequest) -> list[Completion]:
        """`request.samples` completions; their text has no special tokens."""
        answer = await self._post(
            "/inference/v1/generate",
            {
                "token_ids": request.prompt.token_ids,
                "priority": request.order,
                "sampling_params": {
                    "n": request.samples,
                    "seed": request.seed,
                    "temperature": request.temperature,
                    "top_p": 1.0,
                    "top_k": 0,
                    "max_tokens": request.max_new_tokens,
                    "logprobs": 0,
                    "stop_token_ids": [self._tokenizer.eos_token_id],
                    "detokenize": False,
                },
            },
        )
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        if len(choices) != request.samples:
            raise GeneratorError(f"{self.name}: asked for {request.samples} completions, got {len(choices)}")
        return [self._completion(choice) for choice in choices]

    def _completion(self, choice: dict[str, Any]) -> Completion:
        token_ids = choice["token_ids"] or []
        entries = (choice.get("logprobs") or {}).get("content") or []
        if len(entries) != len(token_ids):
            raise GeneratorError(f"{self.name}: {len(token_ids)} tokens came with {len(entries)} log-probabilities")
        return Completion(
            token_ids=token_ids,
            logprobs=[entry["logprob"] for entry in entries],
            versions=self._versions(choice, len(token_ids)),
            finished=bool(token_ids) and token_ids[-1] == self._tokenizer.eos_token_id,
            text=self._tokenizer.decode(token_ids),
        )

    def _versions(self, choice: dict[str, Any], length: int) -> list[int]:
        """Version per token, from vLLM's own record of which weights sampled what."""
        spans = choice.get("weight_versions")
        if spans is None:  # vLLM before 0.30 keeps no record; its weights only change while nothing runs
            return [self.version] * length
        versions = [int(span["version"]) for span in spans for _ in range(span["start"], span["end"])]
        if len(versions) != length:
            raise GeneratorError(f"{self.name}: weight versions cover {len(versions)} of {length} tokens")
        return versions

    async def pause(self, how: Pause = "keep") -> None:
        """From now on requests queue until `resume`; see `Pause` for those under way."""
        await self._post(f"/pause?mode={how}")

    async def resume(self) -> None:
        await self._post("/resume")

    async def wait_queued(self, count: int) -> None:
        """Return once the server has taken in `count` requests; they run after `resume`."""
        try:
            async with asyncio.timeout(self._timeout_s):
                while (await self._get("/load"))["server_load"] < count:
                    await asyncio.sleep(0.005)
        except TimeoutError:
            raise GeneratorError(
                f"{self.name}: {count} requests were not queued within {self._timeout_s:g} s"
            ) from None

    async def join_transfer(self, info: dict[str, Any], *, timeout_s: float) -> None:
        """Rendezvous of this server's workers with the learner; returns when all ranks have met.

        Args:
            info: the fields of the sink's `SinkInit`.
        """
        await self._post("/init_weight_transfer_engine", {"init_info": info}, timeout_s=timeout_s)

    async def receive_weights(self, *, version: int, verify: bool, recompute: bool = False) -> None:
        """The server's half of a push. The engine must be paused; its prefix cache is empty afterwards.

        Returns when every worker holds the weights and, if `verify`, the learner has found them equal to its own. It
        may take as long as weights keep moving: the workers themselves give up when nothing moves any more.

        Raises:
            GeneratorError: the push failed; `version` is -1 then, until one succeeds: parts of two versions may be mixed.
        """
        self.version = -1
        await self._post("/start_weight_update")
        await self._post("/update_weights", {"update_info": {"verify": verify}}, timeout_s=_NO_LIMIT)
        await self._post("/finish_weight_update", {"weight_version": str(version)})
        await self._post("/reset_prefix_cache")
        self.version = version

    async def is_ready(self) -> bool:
        """True once the server answers; False while it is still starting."""
        try:
            async with self._http.get("/health", timeout=aiohttp.ClientTimeout(total=5.0)) as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def close(self) -> None:
        await self._http.close()

    async def _get(self, path: str) -> dict[str, Any]:
        return await self._request("GET", path, None, self._timeout_s)

    async def _post(self, path: str, body: dict | None = None, timeout_s: float | None = None) -> dict[str, Any]:
        return await self._request("POST", path, body, self._timeout_s if timeout_s is None else timeout_s)

    async def _request(self, method: str, path: str, body: dict | None, limit: float) -> dict[str, Any]:
        try:
            async with self._http.request(
                method, path, json=body, timeout=aiohttp.ClientTimeout(total=limit or None)
            ) as response:
                status, content = response.status, await response.read()
        except TimeoutError:
            raise GeneratorGoneError(
                f"{self.name}: no answer to {path} within {limit:g} s; see its log, or raise generator.request_timeout_s"
            ) from None
        except aiohttp.ClientError as error:
            raise GeneratorGoneError(
                f"{self.name}: {path} failed, the server is gone ({type(error).__name__})"
            ) from None
        if status != 200:
            detail = " ".join(content.decode(errors="replace").split())[:300]
            raise GeneratorError(f"{self.name}: {path} answered {status}: {detail}")
        return msgspec.json.decode(content) if content else {}
