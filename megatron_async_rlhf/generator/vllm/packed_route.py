"""A route of vLLM's server for samples: tokens in, tokens and log-probabilities out, as packed numbers.

vLLM's own route for tokens makes an object, and then JSON, of every token's log-probability; where sampling and training have
one core each, one of them waits meanwhile. This is ASGI middleware (vLLM's option `--middleware`): it answers one path itself,
with the server's engine, and passes every other request on to vLLM.
"""

import asyncio
import itertools
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import msgspec
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from megatron_async_rlhf.generator.vllm.packed import PackedAnswer, PackedCompletion, PackedRequest
from megatron_async_rlhf.serving.connection import SAMPLE

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class PackedRoute:
    """ASGI application around another one."""

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]]) -> None:
        self._app = app
        self._numbers = itertools.count()
        self._decoder = msgspec.msgpack.Decoder(PackedRequest)
        self._encoder = msgspec.msgpack.Encoder()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != SAMPLE:
            await self._app(scope, receive, send)
            return
        state = scope["app"].state
        content = await _body(receive)
        # Counted as by vLLM's own routes, for `/load`.
        state.server_load_metrics = getattr(state, "server_load_metrics", 0) + 1
        try:
            status, content = await self._answered(state.engine_client, content, receive)
        finally:
            state.server_load_metrics -= 1
        headers = [(b"content-type", b"application/msgpack"), (b"content-length", str(len(content)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    async def _answered(self, engine: Any, content: bytes, receive: Receive) -> tuple[int, bytes]:
        """HTTP status and body. Sampling ends when the client has gone away."""
        sampling = asyncio.ensure_future(self._sampled(engine, content))
        gone = asyncio.ensure_future(_until_gone(receive))
        try:
            await asyncio.wait([sampling, gone], return_when=asyncio.FIRST_COMPLETED)
            if not sampling.done():
                return 499, b""
            return 200, self._encoder.encode(sampling.result())
        except ValueError as error:  # of the request, msgspec's too; as vLLM's own routes answer it
            return 400, str(error).encode()
        except Exception as error:  # one request's failure must not end the server
            return 500, f"{type(error).__name__}: {error}".encode()
        finally:
            gone.cancel()
            sampling.cancel()

    async def _sampled(self, engine: Any, content: bytes) -> PackedAnswer:
        request = self._decoder.decode(content)
        params = SamplingParams(
            n=request.samples,
            seed=request.seed,
            temperature=request.temperature,
            top_p=1.0,
            top_k=0,
            max_tokens=request.max_tokens,
            logprobs=0,
            flat_logprobs=True,
            stop_token_ids=request.stop_token_ids,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        last = None
        prompt = {"type": "token", "prompt_token_ids": request.token_ids}
        name = f"packed-{next(self._numbers)}"
        async for output in engine.generate(prompt, params, name, priority=request.order):
            last = output
        assert last is not None  # the engine answers every request
        if any(output.finish_reason == "error" for output in last.outputs):
            raise RuntimeError(f"the engine failed on {name}; see the server's log")
        return PackedAnswer([_packed(output) for output in sorted(last.outputs, key=lambda output: output.index)])


def _packed(output: Any) -> PackedCompletion:
    spans = getattr(output, "weight_versions", None)
    return PackedCompletion.of(
        output.token_ids,
        output.logprobs.logprobs if output.logprobs is not None else [],
        finish_reason=output.finish_reason or "",
        versions=None if spans is None else [(span.version, span.start, span.end) for span in spans],
    )


async def _body(receive: Receive) -> bytes:
    parts = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
