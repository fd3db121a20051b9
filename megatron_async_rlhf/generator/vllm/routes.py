"""Three routes of vLLM's server that are this project's own, because one side or the other waits while they are answered.

- samples: tokens in, tokens and log-probabilities out, as packed numbers. vLLM's own route makes an object, and then JSON, of
  every token's log-probability.
- pause: answered as soon as the engine has stopped. vLLM's own route then sleeps for 20 ms, so that outputs of requests that
  have ended mostly come first, which nothing here depends on. The answer also names the version of the weights.
- weights: the generator's half of a push, one request and one call of the workers instead of four and three.

This is ASGI middleware (vLLM's option `--middleware`), which passes every other request on to vLLM.
"""

import asyncio
import itertools
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import parse_qs

import msgspec
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from megatron_async_rlhf.generator.vllm.grouped_outputs import GROUPED
from megatron_async_rlhf.generator.vllm.packed import PackedAnswer, PackedCompletion, PackedRequest
from megatron_async_rlhf.serving.connection import PAUSE, RECEIVE, SAMPLE

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Routes:
    """ASGI application around another one."""

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]]) -> None:
        self._app = app
        self._numbers = itertools.count()
        self._decoder = msgspec.msgpack.Decoder(PackedRequest)
        self._encoder = msgspec.msgpack.Encoder()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        path = scope["path"] if scope["type"] == "http" else None
        if path == SAMPLE:
            await self._sample(scope["app"].state, receive, send)
        elif path in _ENGINE_CALLS:
            await _call(_ENGINE_CALLS[path], scope["app"].state.engine_client, scope["query_string"], send)
        else:
            await self._app(scope, receive, send)

    async def _sample(self, state: Any, receive: Receive, send: Send) -> None:
        content = await _body(receive)
        # Counted as by vLLM's own routes, for `/load`.
        state.server_load_metrics = getattr(state, "server_load_metrics", 0) + 1
        try:
            status, content = await self._answered(state.engine_client, content, receive)
        finally:
            state.server_load_metrics -= 1
        await _respond(send, status, content, b"application/msgpack")

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
        name = f"{GROUPED}-{next(self._numbers)}"
        async for output in engine.generate(prompt, params, name, priority=request.order):
            last = output
        assert last is not None  # the engine answers every request
        if any(output.finish_reason == "error" for output in last.outputs):
            raise RuntimeError(f"the engine failed on {name}; see the server's log")
        return PackedAnswer([_packed(output) for output in sorted(last.outputs, key=lambda output: output.index)])


async def _pause(engine: Any, options: dict[str, str]) -> dict[str, Any]:
    """As `/pause` of vLLM with the same query, then `/weight_info`; the version is None with vLLM before 0.30."""
    pausing = engine.engine_core.pause_scheduler_async(
        mode=options["mode"], clear_cache=options["clear_cache"] == "true"
    )
    if not hasattr(engine, "get_weight_version"):
        await pausing
        return {"weight_version": None}
    _, version = await asyncio.gather(pausing, engine.get_weight_version())
    return {"weight_version": version}


async def _receive_weights(engine: Any, options: dict[str, str]) -> dict[str, Any]:
    """As vLLM's `/start_weight_update`, `/update_weights`, `/finish_weight_update` and `/reset_prefix_cache`."""
    calls = [engine.collective_rpc("take_weights", kwargs={"verify": options["verify"] == "true"})]
    if hasattr(engine, "update_weight_version"):  # vLLM from 0.30 on
        calls.append(engine.update_weight_version(options["version"]))
    if options["clear_cache"] == "true":
        calls.append(_clear_cache(engine))
    # The engine takes its calls in order, so they need not wait for each other's answers. After one that failed the
    # version's name means nothing, here as in the client.
    await asyncio.gather(*calls)
    return {}


async def _clear_cache(engine: Any) -> None:
    if not await engine.reset_prefix_cache(reset_running_requests=True):
        raise RuntimeError("the engine could not empty its cache, which older weights made; see the server's log")


_ENGINE_CALLS = {PAUSE: _pause, RECEIVE: _receive_weights}


async def _call(
    call: Callable[[Any, dict[str, str]], Awaitable[dict[str, Any]]], engine: Any, query: bytes, send: Send
) -> None:
    options = {name: values[-1] for name, values in parse_qs(query.decode()).items()}
    try:
        answer = await call(engine, options)
    except Exception as error:  # one request's failure must not end the server
        await _respond(send, 500, f"{type(error).__name__}: {error}".encode(), b"text/plain")
        return
    await _respond(send, 200, msgspec.json.encode(answer), b"application/json")


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


async def _respond(send: Send, status: int, content: bytes, content_type: bytes) -> None:
    headers = [(b"content-type", content_type), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
