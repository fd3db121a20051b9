"""The routes in front of an engine that answers as vLLM's does; the real one is in tests/e2e."""

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from vllm.sampling_params import RequestOutputKind

from megatron_async_rlhf.generator.vllm.packed import PackedAnswer, PackedRequest
from megatron_async_rlhf.generator.vllm.routes import Routes
from megatron_async_rlhf.serving.connection import PAUSE, SAMPLE

REQUEST = PackedRequest(
    token_ids=[5, 6], samples=2, seed=3, temperature=0.7, max_tokens=4, stop_token_ids=[257], order=11
)


def output(index: int, token_ids: list[int], reason: str = "stop") -> SimpleNamespace:
    logprobs = SimpleNamespace(logprobs=[-token / 100 for token in token_ids])
    spans = [SimpleNamespace(version="7", start=0, end=len(token_ids))]
    return SimpleNamespace(
        index=index, token_ids=token_ids, logprobs=logprobs, finish_reason=reason, weight_versions=spans
    )


class Engine:
    """Answers with these outputs, in the order in which they ended."""

    def __init__(self, *outputs: SimpleNamespace, hangs: bool = False, fails: Exception | None = None) -> None:
        self.outputs, self.hangs, self.fails = outputs, hangs, fails
        self.asked: list[tuple] = []
        self.cancelled = False

    async def generate(self, prompt: Any, params: Any, name: str, priority: int) -> AsyncIterator[SimpleNamespace]:
        self.asked.append((prompt, params, name, priority))
        if self.fails is not None:
            raise self.fails
        try:
            await asyncio.sleep(600 if self.hangs else 0)
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        whole = params.output_kind == RequestOutputKind.FINAL_ONLY
        # Otherwise vLLM tells only of those that ended in its last step.
        yield SimpleNamespace(outputs=list(self.outputs) if whole else [self.outputs[-1]])


def answered(engine: Engine, content: bytes | None = None, path: str = SAMPLE, *, leaves: bool = False) -> tuple:
    """Status, body and the load counted while the engine worked; the body arrives in two parts, as a long one does."""
    content = msgspec.msgpack.encode(REQUEST) if content is None else content
    parts = [
        {"type": "http.request", "body": content[:3], "more_body": True},
        {"type": "http.request", "body": content[3:], "more_body": False},
    ]
    state = SimpleNamespace(engine_client=engine)
    sent: list[dict] = []

    async def receive() -> dict:
        if parts:
            return parts.pop(0)
        if not leaves:
            await asyncio.sleep(600)
        assert state.server_load_metrics == 1
        return {"type": "http.disconnect"}

    async def send(message: dict) -> None:
        sent.append(message)

    async def vllm(scope: dict, receive: Any, send: Any) -> None:
        await send({"status": 404, "body": b"vLLM"})

    path, _, query = path.partition("?")
    scope = {"type": "http", "path": path, "query_string": query.encode(), "app": SimpleNamespace(state=state)}
    asyncio.run(asyncio.wait_for(Routes(vllm)(scope, receive, send), 20.0))
    assert getattr(state, "server_load_metrics", 0) == 0
    return sent[0]["status"], sent[-1]["body"]


def test_all_samples_come_back_in_order():
    engine = Engine(output(1, [66]), output(0, [65, 257], reason="length"))
    status, content = answered(engine)
    assert status == 200
    first, second = msgspec.msgpack.decode(content, type=PackedAnswer).completions
    assert first.unpacked() == ([65, 257], [-0.65, -2.57])
    assert (first.finish_reason, first.versions) == ("length", [("7", 0, 2)])
    assert second.unpacked()[0] == [66] and second.finish_reason == "stop"


def test_the_engine_is_asked_for_what_the_request_says():
    engine = Engine(output(0, [65]), output(1, [66]))
    answered(engine)
    answered(engine)
    prompt, params, _, priority = engine.asked[0]
    assert prompt["prompt_token_ids"] == [5, 6] and priority == 11
    assert (params.n, params.seed, params.temperature, params.max_tokens) == (2, 3, 0.7, 4)
    assert params.stop_token_ids == [257] and params.logprobs == 0 and not params.detokenize
    assert (params.top_p, params.top_k) == (1.0, 0)


def test_requests_have_names_of_their_own():
    engine = Engine(output(0, [65]), output(1, [66]))
    route = Routes(None)

    async def two() -> None:
        for _ in range(2):
            await route._sampled(engine, msgspec.msgpack.encode(REQUEST))

    asyncio.run(two())
    assert len({name for _, _, name, _ in engine.asked}) == 2


def test_sampling_ends_when_nobody_waits_for_it():
    engine = Engine(hangs=True)
    assert answered(engine, leaves=True) == (499, b"")
    assert engine.cancelled


@pytest.mark.parametrize(
    ("engine", "content", "status", "said"),
    [
        (Engine(fails=ValueError("too long")), None, 400, b"too long"),
        (Engine(), b"\x00\x01\x02\x03", 400, b"Expected `array`"),
        (Engine(fails=RuntimeError("no engine")), None, 500, b"RuntimeError: no engine"),
        (Engine(output(0, [], reason="error")), None, 500, b"RuntimeError: the engine failed"),
    ],
)
def test_what_fails_is_said(engine, content, status, said):
    answer = answered(engine, content)
    assert answer[0] == status and answer[1].startswith(said)


def test_other_requests_are_vllms():
    engine = Engine()
    assert answered(engine, path="/health") == (404, b"vLLM")
    assert not engine.asked


@pytest.mark.parametrize(("mode", "clear"), [("keep", True), ("abort", False)])
def test_a_pause_is_the_engines(mode, clear):
    paused = []

    async def pause_scheduler_async(*, mode: str, clear_cache: bool) -> None:
        paused.append((mode, clear_cache))

    engine = SimpleNamespace(engine_core=SimpleNamespace(pause_scheduler_async=pause_scheduler_async))
    status, content = answered(engine, path=f"{PAUSE}?mode={mode}&clear_cache={str(clear).lower()}")
    assert (status, content) == (200, b'{"status": "paused"}') and paused == [(mode, clear)]


def test_an_engine_that_cannot_be_paused_is_told():
    async def pause_scheduler_async(**_: Any) -> None:
        raise RuntimeError("the engine is dead")

    engine = SimpleNamespace(engine_core=SimpleNamespace(pause_scheduler_async=pause_scheduler_async))
    assert answered(engine, path=f"{PAUSE}?mode=keep&clear_cache=true") == (500, b"RuntimeError: the engine is dead")
