"""The client against a server that answers as vLLM does; the real one is in tests/e2e."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from aiohttp import web

from megatron_async_rlhf.data.tokenizer import Tokenizer, make_byte_tokenizer
from megatron_async_rlhf.errors import GeneratorError, GeneratorGoneError, GeneratorSilentError
from megatron_async_rlhf.generator.protocol import SamplingRequest
from megatron_async_rlhf.generator.vllm.client import VLLMGenerator
from megatron_async_rlhf.generator.vllm.packed import PackedAnswer, PackedCompletion, PackedRequest
from megatron_async_rlhf.serving.connection import PAUSE, RECEIVE, SAMPLE
from megatron_async_rlhf.types import Completion, Prompt

PROMPT = Prompt(index=0, text="p", token_ids=[112], reference={})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    make_byte_tokenizer(directory)
    return Tokenizer.load(directory)


def completed(*token_ids: int, reason: str, version: str | None = "7") -> PackedCompletion:
    """As the server tells of one completion; with vLLM before 0.30 without a version."""
    spans = None if version is None else [(version, 0, len(token_ids))]
    return PackedCompletion.of(token_ids, [-1.0] * len(token_ids), finish_reason=reason, versions=spans)


@asynccontextmanager
async def connected(
    tokenizer: Tokenizer, generate: Callable, push: Callable | None = None
) -> AsyncIterator[VLLMGenerator]:
    """A client with version 7; `generate` makes the completions out of a request, `push` is called while weights arrive."""

    async def answer(request: web.Request) -> web.Response:
        asked = msgspec.msgpack.decode(await request.read(), type=PackedRequest)
        return web.Response(body=msgspec.msgpack.encode(PackedAnswer(await generate(asked))))

    async def anything_else(request: web.Request) -> web.Response:
        if push is not None and request.path == RECEIVE:
            await push()
        return web.json_response({"success": True, "weight_version": "7"})

    application = web.Application()
    application.router.add_post(SAMPLE, answer)
    application.router.add_route("*", "/{path:.*}", anything_else)
    async with serving(application, tokenizer) as client:
        client.version = 7
        yield client


@asynccontextmanager
async def serving(
    application: web.Application, tokenizer: Tokenizer, probe_timeout_s: float = 20.0, serves: str | None = None
) -> AsyncIterator[VLLMGenerator]:
    """A client of this server."""
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0]
    client = VLLMGenerator(
        "generator.0",
        f"http://{host}:{port}",
        tokenizer=tokenizer,
        tensor_parallel=1,
        request_timeout_s=20.0,
        probe_timeout_s=probe_timeout_s,
        serves=serves,
    )
    try:
        yield client
    finally:
        await client.close()
        await runner.cleanup()


def request(samples: int = 1, begun: Completion | None = None) -> SamplingRequest:
    return SamplingRequest(prompt=PROMPT, samples=samples, seed=1, temperature=1.0, max_new_tokens=4, begun=begun)


def answered(
    tokenizer: Tokenizer, *completions: PackedCompletion, samples: int = 1, begun: Completion | None = None
) -> list[Completion]:
    async def go() -> list[Completion]:
        async def generate(asked: PackedRequest) -> list[PackedCompletion]:
            return list(completions)

        async with connected(tokenizer, generate) as client:
            return await client.sample(request(samples, begun))

    return asyncio.run(go())


def test_every_sample_of_a_request_comes_back_in_order(tokenizer):
    ended = [completed(65, 257, reason="stop"), completed(65, 66, 257, reason="stop")]
    assert [completion.text for completion in answered(tokenizer, *ended, samples=2)] == ["A", "AB"]
    with pytest.raises(GeneratorError, match="generator.0: asked for 2 completions, got 1"):
        answered(tokenizer, ended[0], samples=2)


def test_tokens_without_their_log_probabilities_are_refused(tokenizer):
    short = PackedCompletion.of([65, 257], [-1.0], finish_reason="stop", versions=None)
    with pytest.raises(GeneratorError, match="generator.0: 2 tokens came with 1 log-probabilities"):
        answered(tokenizer, short)


@pytest.mark.parametrize(
    "reason, finished, interrupted", [("stop", True, False), ("length", False, False), ("abort", False, True)]
)
def test_vllm_says_whether_a_completion_ended(tokenizer, reason, finished, interrupted):
    # 90 (Z) and 258 stand for the other ids of a model's eos_token_id list, of which the tokenizer knows nothing.
    for last in (257, 258, 90):
        (completion,) = answered(tokenizer, completed(65, last, reason=reason))
        assert (completion.finished, completion.interrupted) == (finished, interrupted)
        assert completion.token_ids == [65, last]
        assert completion.text == ("AZ" if last == 90 and not finished else "A")


def test_going_on_ends_as_the_second_part_did(tokenizer):
    (begun,) = answered(tokenizer, completed(65, 66, reason="abort"))
    (whole,) = answered(tokenizer, completed(258, reason="stop"), begun=begun)
    assert (whole.token_ids, whole.text) == ([65, 66, 258], "AB")
    assert whole.finished and not whole.interrupted


def test_what_is_whole_is_not_asked_for_again(tokenizer):
    (cut_at_limit,) = answered(tokenizer, completed(65, 66, 67, 68, reason="abort"))
    (completion,) = answered(tokenizer, completed(reason="stop"), begun=cut_at_limit)
    assert (completion.token_ids, completion.text) == ([65, 66, 67, 68], "ABCD")
    assert not completion.finished and not completion.interrupted
    (ended,) = answered(tokenizer, completed(65, 258, reason="stop"))
    assert answered(tokenizer, completed(66, reason="length"), begun=ended) == [ended]


@pytest.mark.parametrize("under_way", [False, True])
def test_a_cache_that_nobody_uses_is_emptied_once_in_a_push(tokenizer, under_way):
    asked: list[tuple[str, str]] = []

    @web.middleware
    async def note(call: web.Request, handler: Callable) -> web.StreamResponse:
        if "clear_cache" in call.query:
            asked.append((call.path, call.query["clear_cache"]))
        return await handler(call)

    async def answer(_: web.Request) -> web.Response:
        return web.json_response({"weight_version": None})

    async def go() -> None:
        application = web.Application(middlewares=[note])
        application.router.add_route("*", "/{path:.*}", answer)
        async with serving(application, tokenizer) as client, asyncio.timeout(20.0):
            client._under_way = int(under_way)
            for recompute in (True, False):
                await client.pause(clear_cache=False)
                await client.receive_weights(version=1, verify=False, recompute=recompute)
            await client.pause()

    asyncio.run(go())
    unused = "false" if under_way else "true"
    assert asked == [(PAUSE, "false"), (RECEIVE, "true"), (PAUSE, "false"), (RECEIVE, unused), (PAUSE, unused)]


@pytest.mark.parametrize("recorded", ["7", None])
def test_an_answer_that_a_push_cut_off_has_the_version_it_was_sampled_with(tokenizer, recorded):
    async def go() -> list[Completion]:
        asked, pushing, answered = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def generate(_: PackedRequest) -> list[PackedCompletion]:
            asked.set()
            await pushing.wait()
            return [completed(65, 66, reason="abort", version=recorded)]

        async def push() -> None:
            pushing.set()
            await answered.wait()

        async with connected(tokenizer, generate, push) as client, asyncio.timeout(20.0):
            sampling = asyncio.create_task(client.sample(request()))
            await asked.wait()
            await client.pause("abort")
            receiving = asyncio.create_task(client.receive_weights(version=8, verify=False))
            completions = await sampling
            answered.set()
            await receiving
            assert client.version == 8
            return completions

    assert asyncio.run(go())[0].versions == [7, 7]


def test_a_probe_asks_engine_and_workers_not_the_front(tokenizer):
    """`/health` answers 200 whatever the engine does."""

    async def go() -> None:
        engine = asyncio.Event()

        async def healthy(request: web.Request) -> web.Response:
            return web.Response()

        async def hang(request: web.Request) -> web.Response:
            assert (await request.json())["method"] == "check_health"
            await engine.wait()
            return web.json_response({"results": [None]})

        application = web.Application()
        application.router.add_get("/health", healthy)
        application.router.add_post("/collective_rpc", hang)
        async with serving(application, tokenizer, probe_timeout_s=0.3) as client:
            with pytest.raises(GeneratorSilentError, match="generator.0: no answer to /collective_rpc within 0.3 s"):
                await client.probe()
            assert not await client.is_ready()
            engine.set()
            await client.probe()
            assert await client.is_ready()

    asyncio.run(go())


def test_a_server_that_was_told_to_end_is_gone(tokenizer):
    """Who ends a whole job tells every process of it to end; until its API server has ended the engine refuses all work."""

    async def go() -> None:
        async def refuse(request: web.Request) -> web.Response:
            error = {"message": "Server shutting down", "type": "InternalServerError", "param": None, "code": 500}
            return web.json_response({"error": error}, status=500)

        async def healthy(request: web.Request) -> web.Response:
            return web.Response()

        application = web.Application()
        application.router.add_get("/health", healthy)
        application.router.add_post("/{path:.*}", refuse)
        async with serving(application, tokenizer) as client:
            with pytest.raises(GeneratorGoneError, match=f"generator.0: {RECEIVE} failed, the server was told"):
                await client.receive_weights(version=1, verify=True)
            assert client.version == -1

    asyncio.run(go())


def test_nobody_waits_for_requests_at_a_server_that_was_given_up(tokenizer):
    async def go() -> None:
        async def load(request: web.Request) -> web.Response:
            return web.json_response({"server_load": 1})

        application = web.Application()
        application.router.add_get("/load", load)
        async with serving(application, tokenizer) as client, asyncio.timeout(10.0):
            waiting = asyncio.create_task(client.wait_queued(2))
            await asyncio.sleep(0.05)
            client.give_up()
            with pytest.raises(GeneratorGoneError, match="generator.0: was given up"):
                await waiting

    asyncio.run(go())


def model_server(name: str, rows: list | None = None) -> web.Application:
    """A server that has loaded a model itself, and has these log-probabilities of a prompt."""

    async def models(request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": name, "object": "model"}]})

    async def sample(request: web.Request) -> web.Response:
        answer = PackedAnswer([completed(65, 257, reason="stop", version="default")])
        return web.Response(body=msgspec.msgpack.encode(answer))

    async def score(request: web.Request) -> web.Response:
        return web.json_response({"choices": [], "prompt_logprobs": rows})

    async def anything_else(request: web.Request) -> web.Response:
        return web.json_response({})

    application = web.Application()
    application.router.add_get("/v1/models", models)
    application.router.add_post(SAMPLE, sample)
    application.router.add_post("/inference/v1/generate", score)
    application.router.add_route("*", "/{path:.*}", anything_else)
    return application


def test_a_server_of_another_model_is_not_ready(tokenizer):
    """The one before may still have the address."""

    async def go() -> None:
        for there, ready in (("policy", True), ("against", False)):
            async with serving(model_server(there), tokenizer, serves="policy") as client:
                assert await client.is_ready() is ready
        async with serving(model_server("against"), tokenizer, serves="policy") as client:
            with pytest.raises(GeneratorError, match=r"was not ready within 0\.1 s; .*generator\.start_timeout_s"):
                await client.wait_until_ready(0.1)

    asyncio.run(go())


def test_a_model_that_the_server_has_loaded_needs_no_version(tokenizer):
    async def go() -> None:
        async with serving(model_server("policy"), tokenizer, serves="policy") as client:
            (completion,) = await client.sample(request())
            assert completion.token_ids == [65, 257]

    asyncio.run(go())


def test_log_probabilities_are_those_of_the_tokens_asked_for(tokenizer):
    rows = [None, *({str(token): {"logprob": -token / 100}, "9": {"logprob": -0.1}} for token in (66, 67, 68))]

    async def go() -> None:
        async with serving(model_server("kl_to", rows), tokenizer, serves="kl_to") as client:
            assert await client.logprobs([65, 66, 67, 68], 2) == [-0.67, -0.68]
            with pytest.raises(GeneratorError, match="4 log-probabilities came for 3 tokens"):
                await client.logprobs([65, 66, 67], 2)
            with pytest.raises(GeneratorError, match="log-probabilities came"):
                await client.logprobs([65, 66, 67, 68], 0)

    asyncio.run(go())
