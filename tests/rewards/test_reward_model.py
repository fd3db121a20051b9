"""A reward model among servers that answer, die, hang, or give what is no score; the real ones are in tests/e2e."""

import asyncio
import io
import json
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from scoring_server import ScoringServer, score_of, serving
from tiny_reward_model import describe_reward_model

from megatron_async_rlhf.config.reward_model_section import RewardModelSection
from megatron_async_rlhf.config.rewards import Gsm8kRewardSection
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.data.pairs import PreferencePair
from megatron_async_rlhf.data.tokenized_pairs import tokenize_pairs
from megatron_async_rlhf.data.tokenizer import Tokenizer
from megatron_async_rlhf.errors import ConfigError, DataError, RewardError
from megatron_async_rlhf.jobs.reward_models import ServedRewards, length_warnings, load_reward_models
from megatron_async_rlhf.rewards.registry import make_reward
from megatron_async_rlhf.serving import returning
from megatron_async_rlhf.telemetry.events import EventStream
from megatron_async_rlhf.telemetry.recorder import Recorder
from megatron_async_rlhf.types import Completion, Message, Prompt

SHAPE = {"layers": 2, "hidden_size": 64, "ffn_size": 96, "heads": 2, "context_length": 96}
LIMITS = {"request_timeout_s": 0.3, "start_timeout_s": 1.5}


def prompt(index: int = 0, text: str = "Say b.", solution: str | None = None) -> Prompt:
    messages = [Message("user", text)]
    return Prompt(index=index, text=text, messages=messages, token_ids=[1], reference={}, solution=solution)


def completions(*texts: str) -> list[Completion]:
    return [Completion(token_ids=[1], logprobs=[0.0], versions=[0], finished=True, text=text) for text in texts]


class Rewarded:
    """A configured reward connected to stand-in servers, and what it told.

    Args:
        own: the run has started them; else they are of `url`.
    """

    def __init__(self, directory: Path, servers: list[ScoringServer], *, own: bool = True, **keys) -> None:
        model = directory / "reward"
        if not model.exists():
            describe_reward_model(model)
        urls = [server.url for server in servers]
        where = {"replicas": len(urls)} if own else {"url": urls}
        section = {"type": "reward_model", "model": model, **where, **LIMITS, **keys}
        data = {"train": "prompts.jsonl", "solution_field": "solution"}
        self.config = RunConfig.model_validate({"model": SHAPE, "reward": section, "data": data})
        self.told = io.StringIO()
        self.recorder = Recorder(self.config, directory, EventStream(self.told))
        self.reward = make_reward(self.config.rewards)
        load_reward_models(self.config, self.reward, model)
        self.served = ServedRewards(self.config, self.reward, urls if own else [], self.recorder)
        self.tokenizer = Tokenizer.load(model)

    def events(self, kind: str) -> list[dict]:
        lines = [
            json.loads(line.partition("{")[1] + line.partition("{")[2]) for line in self.told.getvalue().splitlines()
        ]
        return [line for line in lines if line["event"] == kind]

    def expected(self, asked: Prompt, text: str) -> float:
        return score_of(self.tokenizer.render_conversation([*asked.messages, Message("assistant", text)]))


@asynccontextmanager
async def rewarded(directory: Path, count: int = 1, **keys) -> AsyncIterator[tuple[Rewarded, list[ScoringServer]]]:
    async with serving(count) as servers:
        made = Rewarded(directory, servers, **keys)
        try:
            async with asyncio.timeout(20):
                yield made, servers
        finally:
            await made.served.close()


@pytest.fixture(autouse=True)
def quick_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(returning, "_WATCH_S", 0.01)


def test_one_request_scores_a_group_as_the_models_template_writes_it(tmp_path):
    async def go() -> None:
        async with rewarded(tmp_path) as (made, (server,)):
            asked = prompt()
            scores = await made.reward.score(asked, completions("b", "bb <eos>", ""))
            assert [s.reward for s in scores] == [made.expected(asked, text) for text in ("b", "bb <eos>", "")]
            assert [s.metrics for s in scores] == [{}] * 3
            (body,) = server.bodies
            assert body["use_activation"] is False and len(body["input"]) == 3
            # The byte tokenizer's template: <user>, the text's bytes, <assistant>, the completion's bytes, the end.
            assert body["input"][0] == [258, *b"Say b.", 259, *b"b", 257]
            assert body["input"][1] == [258, *b"Say b.", 259, *b"bb <eos>", 257], "a spelled token stays text"

    asyncio.run(go())


def test_a_prompt_of_an_earlier_recording_has_its_text_alone(tmp_path):
    recorded = {"index": 7, "text": "Say b.", "token_ids": [1], "reference": {}}
    asked = msgspec.msgpack.decode(msgspec.msgpack.encode(recorded), type=Prompt)

    async def go() -> None:
        async with rewarded(tmp_path) as (made, (server,)):
            await made.reward.score(asked, completions("b"))
            assert server.bodies[0]["input"] == [[258, *b"Say b.", 259, *b"b", 257]]

    asyncio.run(go())


def test_another_template_and_tokens_that_pad_at_the_end(tmp_path):
    """Transformers reads a classifier out at the last token that does not pad."""
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}<pad>{% endfor %}<pad>")

    async def go() -> None:
        async with rewarded(tmp_path, chat_template=template) as (made, (server,)):
            await made.reward.score(prompt(text="ab"), completions("c"))
            assert server.bodies[0]["input"] == [[*b"ab", 256, *b"c"]]

    asyncio.run(go())


@pytest.mark.parametrize(
    "template", [None, "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<eos>\n{% endfor %}"]
)
def test_a_model_is_served_the_rows_that_the_stage_trains_on(tmp_path, template: str | None):
    """Also where the template writes more behind the end of an answer."""
    describe_reward_model(tmp_path / "reward")
    if template is not None:
        (tmp_path / "reward/chat_template.jinja").write_text(template)
    messages = [Message("system", "be brief"), Message("user", "Say b.")]
    pair = PreferencePair(messages=messages, chosen="b", rejected=" <eos>", margin=None, origin="")
    (row,) = tokenize_pairs([pair], Tokenizer.load(tmp_path / "reward"), 96, margin=False).rows

    async def go() -> None:
        async with rewarded(tmp_path) as (made, (server,)):
            asked = msgspec.structs.replace(prompt(), messages=messages)
            await made.reward.score(asked, completions(pair.chosen, pair.rejected))
            assert server.bodies[0]["input"] == [row.chosen, row.rejected]

    asyncio.run(go())


def test_groups_are_spread_over_the_replicas(tmp_path):
    async def go() -> None:
        async with rewarded(tmp_path, 2) as (made, servers):
            for server in servers:
                server.delay_s = 0.05
            prompts = [prompt(i, f"Say {i}.") for i in range(8)]
            scores = await asyncio.gather(*(made.reward.score(p, completions("x", "y")) for p in prompts))
            assert [s.reward for group in scores for s in group] == [
                made.expected(p, text) for p in prompts for text in ("x", "y")
            ]
            assert [len(server.bodies) for server in servers] == [4, 4]

    asyncio.run(go())


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_what_a_lost_server_was_scoring_goes_to_another_and_counts_once(tmp_path, how):
    async def go() -> None:
        async with rewarded(tmp_path, 2, request_timeout_s=0.3) as (made, (bad, good)):
            bad.behaviour = "hangs"
            prompts = [prompt(i, f"Say {i}.") for i in range(12)]
            scoring = [asyncio.create_task(made.reward.score(p, completions("x", "y"))) for p in prompts]
            await bad.asked.wait()
            if how == "dies":
                await bad.die()
            groups = await asyncio.gather(*scoring)
            for asked, scores in zip(prompts, groups, strict=True):
                assert [s.reward for s in scores] == [made.expected(asked, text) for text in ("x", "y")]
            assert not bad.scored
            assert len(good.scored) == 24 and set(good.scored.values()) == {1}, "no sample is lost or scored twice"
            silent = made.events("unresponsive")
            assert [event["name"] for event in silent[:1]] == ([] if how == "dies" else ["reward.0"])
            assert any("reward.0" in event["text"] for event in made.events("note"))

    asyncio.run(go())


def test_groups_wait_for_a_server_that_is_started_again(tmp_path):
    async def go() -> None:
        async with rewarded(tmp_path, start_timeout_s=10) as (made, (server,)):
            server.behaviour = "hangs"
            scoring = [asyncio.create_task(made.reward.score(prompt(i, str(i)), completions("x"))) for i in range(3)]
            await server.asked.wait()
            await server.die()
            server.behaviour = "answers"
            await server.start()
            scores = await asyncio.gather(*scoring)
            assert [s.reward for (s,) in scores] == [made.expected(prompt(i, str(i)), "x") for i in range(3)]
            own = Counter({ids: n for ids, n in server.scored.items() if len(ids) > 1})
            assert len(own) == 3 and set(own.values()) == {1}
            assert any("reward.0 is back" in event["text"] for event in made.events("note"))

    asyncio.run(go())


def test_a_slow_server_is_not_lost_as_long_as_it_answers_somebody(tmp_path):
    async def go() -> None:
        async with rewarded(tmp_path, request_timeout_s=1.0) as (made, (server,)):
            server.behaviour, server.delay_s = "slow", 0.04
            prompts = [prompt(i, f"Say {i}.") for i in range(40)]  # the last one waits for longer than the limit
            groups = await asyncio.gather(*(made.reward.score(p, completions("x")) for p in prompts))
            assert [s.reward for (s,) in groups] == [made.expected(p, "x") for p in prompts]
            assert len(server.scored) == 40 and set(server.scored.values()) == {1}
            assert not made.events("unresponsive") and not made.events("note")

    asyncio.run(go())


def test_what_takes_a_server_longer_than_its_limit_another_one_scores(tmp_path):
    """The slow one answers probes, so it is back at once each time that it was lost."""

    async def go() -> None:
        async with rewarded(tmp_path, 2, request_timeout_s=0.3) as (made, (slow, good)):
            slow.behaviour, slow.delay_s = "slow", 60.0
            prompts = [prompt(i, f"Say {i}.") for i in range(12)]
            groups = await asyncio.gather(*(made.reward.score(p, completions("x", "y")) for p in prompts))
            for asked, scores in zip(prompts, groups, strict=True):
                assert [s.reward for s in scores] == [made.expected(asked, text) for text in ("x", "y")]
            assert len(good.scored) == 24 and set(good.scored.values()) == {1}
            assert "reward.0: has answered no request for 0.3 s" in made.events("unresponsive")[0]["why"]
            assert any("reward.0 is back" in event["text"] for event in made.events("note"))

    asyncio.run(go())


def test_a_group_that_no_server_scores_within_its_limit_is_one_error_in_time(tmp_path):
    async def go() -> None:
        async with rewarded(tmp_path, 2, request_timeout_s=0.2) as (made, servers):
            for server in servers:
                server.behaviour, server.delay_s = "slow", 60.0
            began = time.monotonic()
            with pytest.raises(RewardError) as raised:
                await made.reward.score(prompt(3), completions("x"))
            assert time.monotonic() - began < 4 * (0.2 + LIMITS["start_timeout_s"])
            message = str(raised.value)
            assert "4 servers were lost one after the other" in message and "\n" not in message
            assert "reward.request_timeout_s, raise that" in message and "prompt 3 ('Say b.')" in message
            assert {event["name"] for event in made.events("unresponsive")} == {"reward.0", "reward.1"}

    asyncio.run(go())


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_without_a_server_there_is_one_error_in_time(tmp_path, how):
    async def go() -> None:
        async with rewarded(tmp_path, 2) as (made, servers):
            for server in servers:
                server.behaviour = "hangs"
                if how == "dies":
                    await server.die()
            began = time.monotonic()
            with pytest.raises(RewardError) as raised:
                await made.reward.score(prompt(3), completions("x"))
            assert time.monotonic() - began < 2 * LIMITS["request_timeout_s"] + LIMITS["start_timeout_s"] + 3
            message = str(raised.value)
            assert "no server of it is left (reward.0, reward.1)" in message and "\n" not in message
            assert "reward.start_timeout_s = 1.5" in message and "prompt 3 ('Say b.')" in message

    asyncio.run(go())


WRONG = {
    "nan": "reward.0: gave a score that is no finite number",
    "null": "reward.0: gave None for completion 1, which is no finite number",
    "missing": "reward.0: gave 1 scores for 2 completions",
    "labels": "reward.0: gave 2 numbers for a completion; a reward model has one label",
    "garbage": "reward.0: /classify answered something else than expected",
    "broken": "reward.0: /classify answered 500: .*the engine could not do it",
}


@pytest.mark.parametrize("behaviour", WRONG)
def test_what_is_no_score_names_server_and_prompt(tmp_path, behaviour):
    async def go() -> None:
        async with rewarded(tmp_path) as (made, (server,)):
            server.behaviour = behaviour
            with pytest.raises(RewardError, match=rf"{WRONG[behaviour]}.*the prompt is prompt 5 \('Say b.'\)"):
                await made.reward.score(prompt(5), completions("x", "y"))
            server.behaviour = "answers"
            await made.reward.score(prompt(5), completions("x", "y"))

    asyncio.run(go())


@pytest.mark.parametrize(
    ("behaviour", "told"), [("null", "gave None"), ("nan", "gave a score that is no finite number")]
)
def test_failures_may_count_as_zero(tmp_path, behaviour: str, told: str):
    async def go() -> None:
        async with rewarded(tmp_path, on_error="zero") as (made, (server,)):
            server.behaviour = behaviour
            failed = await made.reward.score(prompt(), completions("x", "y"))
            assert [(s.reward, s.metrics) for s in failed] == [(0.0, {"reward_failed": 1.0})] * 2
            assert f"reward.0: {told}" in (failed[0].failure or "")
            server.behaviour = "answers"
            (scored,) = await made.reward.score(prompt(), completions("x"))
            assert scored.metrics == {"reward_failed": 0.0} and scored.failure is None

    asyncio.run(go())


def test_a_completion_that_does_not_fit_is_not_sent(tmp_path):
    async def go() -> None:
        async with rewarded(tmp_path, context_length=21) as (made, (server,)):
            (fits,) = await made.reward.score(prompt(), completions("x" * 12))  # with 9 tokens around it
            with pytest.raises(RewardError, match="makes 22 tokens with its conversation, above the 21 .* prompt 0"):
                await made.reward.score(prompt(), completions("x", "x" * 13))
            assert len(server.bodies) == 1

    asyncio.run(go())


def test_of_a_group_only_what_does_not_fit_counts_as_zero(tmp_path):
    async def go() -> None:
        async with rewarded(tmp_path, context_length=21, on_error="zero") as (made, (server,)):
            (alone,) = await made.reward.score(prompt(), completions("x"))
            long, fits = await made.reward.score(prompt(), completions("x" * 13, "x"))
            assert fits == alone and fits.failure is None
            assert (long.reward, long.metrics) == (0.0, {"reward_failed": 1.0})
            assert "makes 22 tokens" in (long.failure or "") and "the prompt is prompt 0" in (long.failure or "")
            sent = len(server.bodies)
            (long,) = await made.reward.score(prompt(), completions("x" * 13))
            assert long.reward == 0.0 and len(server.bodies) == sent  # nothing was left to ask

    asyncio.run(go())


def test_prompts_that_cannot_fit_are_refused_and_those_that_may_not_are_told_of(tmp_path):
    async def go() -> None:
        async with rewarded(tmp_path, context_length=21) as (made, _):
            made.reward.check(prompt(text="x" * 18))
            with pytest.raises(DataError, match="prompt 0 .* has 22 tokens in the chat template of reward.model"):
                made.reward.check(prompt(text="x" * 19))
            (line,) = length_warnings(made.config, made.reward, [prompt()])
            assert "reads 21 tokens; the longest prompt has 9" in line and "ends the run (reward.on_error)" in line

    asyncio.run(go())


def test_scores_are_centred_on_solutions_once_in_a_run(tmp_path):
    solved = [prompt(i, f"Say {i}.", solution=str(i)) for i in range(6)] + [prompt(9)]

    async def started(**keys) -> tuple[float, float, int]:
        async with rewarded(tmp_path, center_on_solutions=6, **keys) as (made, (server,)):
            await made.served.start(tmp_path, solved)
            asked = sum(len(ids) > 1 for ids in server.scored)
            (score,) = await made.reward.score(prompt(), completions("x"))
            mean = sum(made.expected(p, p.solution or "") for p in solved[:6]) / 6
            return made.expected(prompt(), "x") - score.reward, mean, asked

    subtracted, mean, asked = asyncio.run(started())
    assert subtracted == pytest.approx(mean) and asked == 6
    path = tmp_path / "reward_centers.json"
    assert json.loads(path.read_text()) == {"reward": pytest.approx(mean)}
    path.write_text('{"reward": 2.5}')  # a resumed run goes by what it began with
    subtracted, _, asked = asyncio.run(started())
    assert subtracted == pytest.approx(2.5) and asked == 0


def test_too_few_solutions_are_told_before_anything_starts(tmp_path):
    describe_reward_model(tmp_path / "reward")
    section = RewardModelSection(model=tmp_path / "reward", center_on_solutions=3)
    reward = make_reward([section])
    with pytest.raises(ConfigError, match="center_on_solutions = 3: only 1 prompts to train on have a solution"):
        reward.drawn_solutions([prompt(0, solution="0"), prompt(1)], seed=0)


def test_a_server_of_another_kind_is_refused_at_once(tmp_path):
    async def go() -> None:
        async with rewarded(tmp_path, start_timeout_s=60) as (made, (server,)):
            server.behaviour = "labels"
            with pytest.raises(RewardError, match="reward.0: gave 2 numbers .*; reward.model cannot be served so"):
                await made.served.start(tmp_path, [])

    asyncio.run(go())


def test_a_server_that_does_not_come_is_named(tmp_path):
    async def go() -> None:
        async with rewarded(tmp_path, own=False, start_timeout_s=0.5) as (made, (server,)):
            await server.die()
            with pytest.raises(RewardError, match=r"reward.url.0 was not ready within 0.5 s .*, or correct reward.url"):
                await made.served.start(tmp_path, [])

    asyncio.run(go())


def test_the_supervisor_hears_of_servers_that_it_has_started_by_their_names(tmp_path):
    """Those of others, which a configuration may name first, are nobody's to start again."""
    describe_reward_model(tmp_path / "reward")

    async def go() -> list[dict]:
        async with serving(2) as (theirs, ours):
            entry = {"type": "reward_model", "model": tmp_path / "reward", "on_error": "zero", **LIMITS}
            entries = [entry | {"name": "theirs", "url": [theirs.url]}, entry | {"name": "ours"}]
            config = RunConfig.model_validate({"model": SHAPE, "reward": entries})
            told = io.StringIO()
            reward = make_reward(config.rewards)
            load_reward_models(config, reward, tmp_path / "reward")
            served = ServedRewards(config, reward, [ours.url], Recorder(config, tmp_path, EventStream(told)))
            theirs.behaviour = ours.behaviour = "hangs"
            try:
                async with asyncio.timeout(20):
                    await reward.score(prompt(), completions("x"))
            finally:
                await served.close()
            assert "reward.0.url.0: has answered no request" in told.getvalue(), "who watches hears of all"
            return [line for line in told.getvalue().splitlines() if '"unresponsive"' in line]

    silent = asyncio.run(go())
    assert silent and all('"name": "reward.0"' in line for line in silent)


def test_its_busy_time_is_the_union_over_servers(tmp_path):
    async def go() -> None:
        async with rewarded(tmp_path, 2) as (made, servers):
            for server in servers:
                server.delay_s = 0.1
            await made.reward.score(prompt(), completions("x"))
            assert made.recorder.totals.reward_busy_s == 0, "an evaluation before the loop"
            made.recorder.loop_started(0.0)
            await asyncio.gather(*(made.reward.score(prompt(i), completions("x", "y")) for i in range(2)))
            made.recorder.close("completed", None)
        summary = json.loads((tmp_path / "summary.json").read_text())
        assert 0.09 < summary["reward_busy_seconds"] <= summary["wall_seconds"] + 0.001
        trace = json.loads((tmp_path / "trace.json").read_text())
        lanes = {e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"}
        assert lanes == {"reward.0", "reward.1"}
        spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
        assert sorted(event["args"]["samples"] for event in spans) == [1, 2, 2]

    asyncio.run(go())


def test_it_is_one_part_of_a_sum_among_others(tmp_path):
    describe_reward_model(tmp_path / "reward")
    entries = [Gsm8kRewardSection(), RewardModelSection(model=tmp_path / "reward", name="helpful", weight=0.5)]
    data = {"train": "prompts.jsonl", "solution_field": "solution"}
    config = RunConfig.model_validate({"model": SHAPE, "reward": entries, "data": data})
    assert list(config.reward_models) == ["reward.1"]
    reward = make_reward(config.rewards)
    load_reward_models(config, reward, tmp_path)
    with pytest.raises(DataError, match=r"in the chat template of reward\.1\.model"):
        long = Prompt(index=0, text="x" * 200, token_ids=[1], reference={"solution": "#### 1"})
        reward.check(long)
