"""The routes in front of an engine that answers as vLLM's does; the real one is in tests/e2e."""

import asyncio
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from vllm.sampling_params import RequestOutputKind

from megatron_async_rlhf.generator.vllm.packed import PackedAnswer, PackedRequest
from megatron_async_rlhf.generator.vllm.routes import Routes
from megatron_async_rlhf.serving.connection import PAUSE, RECEIVE, SAMPLE

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


def answered(engine: Any, content: bytes | None = None, path: str = SAMPLE, *, leaves: bool = False) -> tuple:
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


class PausedEngine:
    """Takes the calls of a push, and keeps what it was told; `fails` at the call of this name.

    Attributes:
        emptied: whether it can empty its cache.
    """

    def __init__(self, *, fails: str = "", emptied: bool = True) -> None:
        self.calls: list[tuple] = []
        self.engine_core = self
        self._fails, self._emptied = fails, emptied

    async def pause_scheduler_async(self, *, mode: str, clear_cache: bool) -> None:
        self._take("pause", mode, clear_cache)

    async def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        self._take(method, kwargs)

    async def reset_prefix_cache(self, *, reset_running_requests: bool) -> bool:
        self._take("reset", reset_running_requests)
        return self._emptied

    def _take(self, *call: Any) -> None:
        if call[0] == self._fails:
            raise RuntimeError("the engine is dead")
        self.calls.append(call)


class VersionedEngine(PausedEngine):
    """vLLM's from 0.30 on."""

    async def get_weight_version(self) -> str:
        return "7"

    async def update_weight_version(self, version: str) -> None:
        self._take("version", version)


@pytest.mark.parametrize(("mode", "clear"), [("keep", True), ("abort", False)])
def test_a_pause_is_the_engines(mode, clear):
    for engine, version in ((PausedEngine(), None), (VersionedEngine(), "7")):
        status, content = answered(engine, path=f"{PAUSE}?mode={mode}&clear_cache={str(clear).lower()}")
        assert (status, json.loads(content)) == (200, {"weight_version": version})
        assert engine.calls == [("pause", mode, clear)]


def test_weights_are_taken_then_named_then_the_cache_is_emptied():
    engine = VersionedEngine()
    assert answered(engine, path=f"{RECEIVE}?version=8&verify=true&clear_cache=true") == (200, b"{}")
    assert engine.calls == [("take_weights", {"verify": True}), ("version", "8"), ("reset", True)]
    engine = VersionedEngine()
    assert answered(engine, path=f"{RECEIVE}?version=8&verify=false&clear_cache=false") == (200, b"{}")
    assert engine.calls == [("take_weights", {"verify": False}), ("version", "8")]
    engine = PausedEngine()
    assert answered(engine, path=f"{RECEIVE}?version=8&verify=false&clear_cache=true") == (200, b"{}")
    assert engine.calls == [("take_weights", {"verify": False}), ("reset", True)]


@pytest.mark.parametrize(
    ("engine", "path", "said", "done"),
    [
        (VersionedEngine(fails="pause"), f"{PAUSE}?mode=keep&clear_cache=true", b"RuntimeError: the engine is dead", 0),
        (VersionedEngine(fails="take_weights"), f"{RECEIVE}?version=8&verify=true&clear_cache=true", b"RuntimeError: the", 2),
        (VersionedEngine(emptied=False), f"{RECEIVE}?version=8&verify=true&clear_cache=true", b"RuntimeError: the engine could not empty", 3),
    ],
)  # fmt: skip
def test_a_call_that_fails_ends_a_push_and_is_told(engine, path, said, done):
    status, content = answered(engine, path=path)
    assert status == 500 and content.startswith(said)
    assert len(engine.calls) == done
