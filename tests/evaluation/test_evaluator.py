"""The job of an evaluation against servers that answer as vLLM does: who is asked what, and what is not asked again."""

import asyncio
import json
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from aiohttp import web
from tiny_reward_model import describe_reward_model

from megatron_async_rlhf.config.load import dump_config, load_config
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.generator.vllm.packed import PackedAnswer, PackedCompletion, PackedRequest
from megatron_async_rlhf.jobs import evaluate
from megatron_async_rlhf.jobs.addresses import Addresses
from megatron_async_rlhf.jobs.inputs import make_model_template
from megatron_async_rlhf.serving.connection import SAMPLE
from megatron_async_rlhf.telemetry.events import EventStream

FRESH = "model={layers: 2, hidden_size: 64, ffn_size: 96, heads: 2, context_length: 96}"
SETTINGS = ("data={train_prompts: 8, eval_prompts: 6}", "generator.max_new_tokens=12", "eval.bootstrap=50")


class Server:
    """Answers `A` and the end; fails from the `broken_after`-th request on. It is whatever model was requested last.

    Attributes:
        interrupted_after: so many requests the evaluation is told to end, and nothing is answered any more.
    """

    def __init__(self) -> None:
        self.model, self.asked = "", Counter()
        self.broken_after = self.interrupted_after = 10**6
        self.requests: list[PackedRequest] = []
        self.scored: list[list[int]] = []

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": self.model}]})

    async def _take(self) -> web.Response | None:
        """Count a request; what to answer instead if it is not to be served."""
        if self.asked.total() == self.interrupted_after:
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(600)
        if self.asked.total() >= self.broken_after:
            return web.Response(status=400, text="no more")
        self.asked[self.model] += 1
        return None

    async def sample(self, request: web.Request) -> web.Response:
        asked = msgspec.msgpack.decode(await request.read(), type=PackedRequest)
        self.requests.append(asked)
        if (refusal := await self._take()) is not None:
            return refusal
        completion = PackedCompletion.of([65, 257], [-0.5] * 2, finish_reason="stop", versions=None)
        return web.Response(body=msgspec.msgpack.encode(PackedAnswer([completion] * asked.samples)))

    async def score(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.scored.append(body["token_ids"])
        if (refusal := await self._take()) is not None:
            return refusal
        rows = [None, *({str(token): {"logprob": -1.0}} for token in body["token_ids"][1:])]
        return web.json_response({"choices": [], "prompt_logprobs": rows})

    async def classify(self, request: web.Request) -> web.Response:
        """As a reward model that counts tokens."""
        sequences = (await request.json())["input"]
        scores = [{"index": i, "probs": [float(len(tokens))]} for i, tokens in enumerate(sequences)]
        return web.json_response({"data": scores})

    async def anything_else(self, request: web.Request) -> web.Response:
        return web.json_response({})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server, emit = Server(), EventStream.emit

    def emitted(self, kind, **fields):
        if kind == "serve":  # what the supervisor does
            server.model = fields["name"]
        emit(self, kind, **fields)

    monkeypatch.setattr(EventStream, "emit", emitted)
    yield server


def prepared(tmp_path: Path, *settings: str) -> Path:
    """A directory as the command leaves it to the job."""
    (tmp_path / "c.yaml").write_text("{}")
    fresh = load_config(tmp_path / "c.yaml", [FRESH, *SETTINGS])
    run_dir = tmp_path / "run"
    for name in ("policy", "against", "kl_to"):
        make_model_template(fresh, run_dir / "served" / name)
    config: RunConfig = load_config(tmp_path / "c.yaml", [f"model={{hf: {tmp_path}}}", *SETTINGS, *settings])
    (run_dir / "config.yaml").write_text(dump_config(config))
    return run_dir


def run(run_dir: Path, server: Server) -> int:
    async def go() -> int:
        application = web.Application()
        application.router.add_get("/v1/models", server.models)
        application.router.add_post(SAMPLE, server.sample)
        application.router.add_post("/inference/v1/generate", server.score)
        application.router.add_post("/classify", server.classify)
        application.router.add_route("*", "/{path:.*}", server.anything_else)
        runner = web.AppRunner(application, shutdown_timeout=0.05)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0]
        try:
            url = f"http://{host}:{port}"
            return await evaluate.run_job(run_dir, Addresses(learner="", generators=[url] * 2, rewards=[url]))
        finally:
            await runner.cleanup()

    return asyncio.run(go())


@pytest.mark.parametrize(
    ("kl_to", "asked"), [("other", {"against": 6, "kl_to": 6}), ("", {"against": 12})], ids=["two", "the same"]
)
def test_each_model_is_served_once_and_asked_once_for_each_prompt(tmp_path, server, kl_to, asked):
    run_dir = prepared(tmp_path, f"eval={{against: {tmp_path}, kl_to: {tmp_path / kl_to}, bootstrap: 50}}")
    assert run(run_dir, server) == 0
    assert server.asked == {"policy": 6} | asked
    content = json.loads((run_dir / "eval.json").read_text())
    assert content["wins"]["win_rate"]["mean"] == 0.5  # the same answers
    assert content["kl"]["kl_k1"]["mean"] == pytest.approx(1.0)  # two tokens, half a nat each
    assert server.scored[0][-2:] == [65, 257]
    assert json.loads((run_dir / "summary.json").read_text())["eval"]["wins"]["win_rate"] == 0.5


def test_what_is_answered_is_not_asked_again(tmp_path, server):
    run_dir = prepared(tmp_path, f"eval={{against: references, kl_to: {tmp_path}, bootstrap: 50}}")
    server.broken_after = 8
    assert run(run_dir, server) == 1
    assert "no more" in json.loads((run_dir / "summary.json").read_text())["error"]
    assert not (run_dir / "eval.json").exists()
    assert server.asked == {"policy": 6, "kl_to": 2}
    server.broken_after, server.asked = 10**6, Counter()
    assert run(run_dir, server) == 0
    assert server.asked == {"kl_to": 4}
    assert len((run_dir / "answers.jsonl").read_text().splitlines()) == 6


def test_an_interrupt_keeps_what_is_answered(tmp_path, server):
    run_dir = prepared(tmp_path)
    server.interrupted_after = 4
    assert run(run_dir, server) == 130
    assert json.loads((run_dir / "summary.json").read_text())["status"] == "interrupted"
    kept = len((run_dir / "progress/policy.jsonl").read_text().splitlines())  # of the 4: those that had arrived
    server.interrupted_after, server.asked = 10**6, Counter()
    assert run(run_dir, server) == 0
    assert server.asked == {"policy": 6 - kept}


def test_a_served_reward_model_decides(tmp_path, server):
    """The more tokens the higher its score: the policy writes one before the end."""
    model = describe_reward_model(tmp_path / "rm")
    reward = f"reward=[{{type: builtin}}, {{type: reward_model, name: rm, model: {model}}}]"
    run_dir = prepared(tmp_path, reward, "eval={against: references, judged_by: rm, bootstrap: 50}")
    assert run(run_dir, server) == 0
    lines = [json.loads(line) for line in (run_dir / "answers.jsonl").read_text().splitlines()]
    content = json.loads((run_dir / "eval.json").read_text())
    scores = [(line["policy"][0]["scores"]["reward/rm"], line["against"][0]["scores"]["reward/rm"]) for line in lines]
    gaps = [len(line["policy"][0]["text"]) - len(line["against"][0]["text"]) for line in lines]  # bytes are tokens
    assert [ours - theirs for ours, theirs in scores] == gaps
    assert (content["judged_by"], content["wins"]["lost"]) == ("rm", sum(gap < 0 for gap in gaps))
    assert json.loads((run_dir / "summary.json").read_text())["reward_busy_seconds"] > 0


def test_several_answers_are_sampled_in_one_request(tmp_path, server):
    settings = ("eval.samples=3", "eval.temperature=0.7", "eval.k=[1, 3]", "eval.max_new_tokens=7", "eval.seed=3")
    run_dir = prepared(tmp_path, *settings)
    assert run(run_dir, server) == 0
    assert {(asked.samples, asked.temperature, asked.max_tokens) for asked in server.requests} == {(3, 0.7, 7)}
    assert len({asked.seed for asked in server.requests}) == 6
    content = json.loads((run_dir / "eval.json").read_text())
    assert {"pass@1", "pass@3"} <= content["metrics"].keys()
    assert content["prompts"] == 6
