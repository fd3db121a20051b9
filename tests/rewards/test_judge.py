"""A judge behind an endpoint that is slow, limits, breaks, lies and dies: what is asked, what is paid, what comes of it."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from aiohttp import web
from judge_server import Server, longer_is_better, question, serving

from megatron_async_rlhf.config.judge import JudgeKeys
from megatron_async_rlhf.errors import ConfigError, JudgeBudgetError, JudgeError
from megatron_async_rlhf.launch.nodes import free_ports
from megatron_async_rlhf.rewards.judge.judge import Comparison, Judge, check_api_key, check_template

LIMITS = {"timeout_s": 5.0, "give_up_s": 20.0}


def judge(server: Server | str, tmp_path: Path, **keys: object) -> Judge:
    url = server if isinstance(server, str) else server.url
    return Judge(JudgeKeys(**{"url": url, "model": "m", **LIMITS, **keys}), cache=tmp_path / "judge.sqlite")


def with_server(say: Callable, what: Callable[[Server], Awaitable[None]]) -> None:
    async def go() -> None:
        async with serving(say) as server:
            await what(server)

    asyncio.run(go())


def status(code: int, text: str = "no", **headers: str) -> web.Response:
    return web.Response(
        status=code, text=text, headers={name.replace("_", "-"): value for name, value in headers.items()}
    )


def test_the_bias_of_a_judge_that_always_says_a_cancels(tmp_path: Path):
    async def what(server: Server) -> None:
        assert await judge(server, tmp_path).compare("p", "x", "y") == Comparison(0.5, False)
        assert await judge(server, tmp_path, swap=False).compare("p", "x", "y") == Comparison(1.0, True)

    with_server(lambda request, number: "[[A]]", what)


def test_it_prefers_what_both_orders_prefer(tmp_path: Path):
    async def what(server: Server) -> None:
        one = judge(server, tmp_path)
        assert await one.compare("p", "xxx", "y") == Comparison(1.0, True)
        assert await one.compare("p", "y", "xxx") == Comparison(0.0, True)  # the same two questions
        assert await one.compare("p", "xx", "yy") == Comparison(0.5, False)
        assert len(server.requests) == 4
        assert await one.compare("p", "same", "same") == Comparison(0.5, False)
        assert len(server.requests) == 4

    with_server(longer_is_better, what)


def test_nothing_is_asked_twice_neither_at_the_same_time_nor_after_a_restart(tmp_path: Path):
    async def slow(request: dict, number: int) -> str:
        await asyncio.sleep(0.2)
        return longer_is_better(request, number)

    async def what(server: Server) -> None:
        one = judge(server, tmp_path)
        results = await asyncio.gather(*(one.compare("p", "xx", "y") for _ in range(5)))
        assert results == [Comparison(1.0, True)] * 5 and len(server.requests) == 2
        assert await judge(server, tmp_path).compare("p", "xx", "y") == Comparison(1.0, True)
        assert len(server.requests) == 2
        assert await judge(server, tmp_path, model="other").compare("p", "xx", "y") == Comparison(1.0, True)
        assert await judge(server, tmp_path, temperature=0.5).compare("p", "xx", "y") == Comparison(1.0, True)
        assert len(server.requests) == 6
        assert len({json.dumps(request) for request in server.requests}) == 6

    with_server(slow, what)


def test_an_answer_that_nobody_waits_for_any_more_is_kept(tmp_path: Path):
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def held(request: dict, number: int) -> str:
        asked.set()
        await go_on.wait()
        return "[[A]]"

    async def what(server: Server) -> None:
        one = judge(server, tmp_path, swap=False)
        waiting = asyncio.create_task(one.compare("p", "x", "y"))
        await asked.wait()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        go_on.set()
        assert await one.compare("p", "x", "y") == Comparison(1.0, True)
        assert len(server.requests) == 1

    with_server(held, what)


def test_a_rate_limit_is_kept_by_all_requests(tmp_path: Path):
    def limited(request: dict, number: int) -> str | web.Response:
        return status(429, "slow down", Retry_After="1.5") if number == 1 else "[[7]]"

    async def what(server: Server) -> None:
        one = judge(server, tmp_path, form="pointwise", budget={"max_calls": 4})
        first = asyncio.create_task(one.rate("p", "a0"))
        while not server.requests:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)  # the answer 429 has arrived
        others = [one.rate("p", f"a{i}") for i in range(1, 4)]
        assert await asyncio.gather(first, *others) == [7.0] * 4
        assert len(server.requests) == 5 and len(server.answered) == 4  # what was refused costs nothing
        assert min(server.times[1:]) - server.times[0] >= 1.4

    with_server(limited, what)


def test_a_rate_limit_may_be_a_date(tmp_path: Path):
    def limited(request: dict, number: int) -> str | web.Response:
        return status(429, Retry_After="Fri, 01 Jan 2100 00:00:00 GMT") if number == 1 else "[[7]]"

    async def what(server: Server) -> None:
        one = judge(server, tmp_path, form="pointwise", timeout_s=2.0, give_up_s=2.0)
        with pytest.raises(JudgeError, match="another try would pass; the last of 1: it answered 429"):
            await one.rate("p", "a")

    with_server(limited, what)


def test_two_judges_with_one_cache_have_one_budget(tmp_path: Path):
    async def slow(request: dict, number: int) -> str:
        await asyncio.sleep(0.05)
        return "[[7]]"

    async def what(server: Server) -> None:
        both = [judge(server, tmp_path, form="pointwise", budget={"max_calls": 7}) for _ in range(2)]
        asked = (one.rate("p", f"{number} {i}") for number, one in enumerate(both) for i in range(10))
        results = await asyncio.gather(*asked, return_exceptions=True)
        assert results.count(7.0) == len(server.requests) == 7
        assert sum(isinstance(result, JudgeBudgetError) for result in results) == 13

    with_server(slow, what)


def test_what_may_be_better_at_the_next_try_is_tried_again(tmp_path: Path):
    def shaky(request: dict, number: int) -> str | web.Response:
        bad = {1: status(500), 2: status(200, "<html>"), 3: status(200, '{"choices": []}')}
        return bad.get(number) or "[[A]]"

    async def what(server: Server) -> None:
        assert await judge(server, tmp_path, swap=False).compare("p", "x", "y") == Comparison(1.0, True)
        assert len(server.requests) == 4

    with_server(shaky, what)


def test_an_endpoint_that_hangs_then_dies_then_comes_back(tmp_path: Path):
    async def hangs(request: dict, number: int) -> str:
        await asyncio.sleep(1000)
        return ""

    async def go() -> None:
        (port,) = free_ports(1)
        async with serving(hangs, port) as hanging:
            one = judge(hanging, tmp_path, swap=False, timeout_s=1.0)
            waiting = asyncio.create_task(one.compare("p", "x", "y"))
            while not hanging.requests:
                await asyncio.sleep(0.01)
        await asyncio.sleep(1.0)  # nobody listens
        async with serving(lambda request, number: "[[B]]", port) as server:
            assert await waiting == Comparison(0.0, True)
            assert len(server.requests) == 1

    asyncio.run(go())


def test_it_ends_in_time_with_one_line(tmp_path: Path):
    async def hangs(request: dict, number: int) -> str:
        await asyncio.sleep(1000)
        return ""

    async def go() -> None:
        limits = {"timeout_s": 0.5, "give_up_s": 2.0, "swap": False}
        async with asyncio.timeout(20.0):
            async with serving(hangs) as server:
                with pytest.raises(
                    JudgeError, match=r"^judge m at http.*: no answer within judge.give_up_s = 2"
                ) as slow:
                    await judge(server, tmp_path, **limits).compare("p", "x", "y")
                assert "judge.timeout_s = 0.5" in str(slow.value)
            with pytest.raises(JudgeError, match="no answer within judge.give_up_s = 2.*no connection") as gone:
                await judge(f"http://127.0.0.1:{free_ports(1)[0]}/v1", tmp_path, **limits).compare("p", "x", "y")
            assert "\n" not in str(gone.value)
            async with serving(lambda request, number: status(429, "later", Retry_After="3600")) as limiting:
                with pytest.raises(JudgeError, match="another try would pass; the last of 1: it answered 429: later"):
                    await judge(limiting, tmp_path, **limits).compare("p", "x", "y")

    asyncio.run(go())


def test_the_budget_holds_to_the_call_and_over_restarts(tmp_path: Path):
    async def slow(request: dict, number: int) -> str:
        await asyncio.sleep(0.05)
        return "[[7]]"

    async def rate_ten(server: Server, **budget: int) -> list[float | BaseException]:
        one = judge(server, tmp_path, form="pointwise", budget=budget)
        return await asyncio.gather(*(one.rate("p", f"answer {i}") for i in range(10)), return_exceptions=True)

    async def what(server: Server) -> None:
        results = await rate_ten(server, max_calls=5)
        assert results.count(7.0) == len(server.requests) == 5
        errors = [result for result in results if result != 7.0]
        assert all(isinstance(error, JudgeBudgetError) for error in errors)
        assert "the budget is spent: 5 calls, judge.budget.max_calls = 5. Raise it and continue" in str(errors[0])
        assert str(tmp_path / "judge.sqlite") in str(errors[0]) and "\n" not in str(errors[0])
        assert (await rate_ten(server, max_calls=7)).count(7.0) == len(server.requests) == 7
        with_tokens = await rate_ten(server, max_tokens=70)  # an answer costs 10
        assert with_tokens.count(7.0) == len(server.requests) == 7
        assert "70 tokens, judge.budget.max_tokens = 70" in str(next(each for each in with_tokens if each != 7.0))
        assert await rate_ten(server) == [7.0] * 10
        assert len(server.requests) == 10

    with_server(slow, what)


def test_an_answer_that_says_nothing_is_asked_for_once_more_then_named(tmp_path: Path):
    async def what(server: Server) -> None:
        first = judge(server, tmp_path, form="pointwise")
        assert await first.rate("p", "understood the second time") == 3.0
        assert [request["seed"] for request in server.requests] == [0, 1]
        for _ in range(2):  # the second time from the cache
            with pytest.raises(
                JudgeError, match="no verdict can be read from its answer 'I like it' on the prompt 'p'"
            ):
                await judge(server, tmp_path, form="pointwise").rate("p", "never")
            assert len(server.requests) == 4
        with pytest.raises(JudgeError, match="answer '.*99.*'"):  # out of its range
            await judge(server, tmp_path, form="pointwise").rate("p", "much")

    def vague(request: dict, number: int) -> str:
        if "much" in question(request):
            return "[[99]]"
        return "[[3]]" if "second time" in question(request) and request["seed"] == 1 else "I like it"

    with_server(vague, what)


def test_the_key_goes_into_the_request_and_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OUR_JUDGE_KEY", "s3cret")

    async def what(server: Server) -> None:
        with pytest.raises(
            JudgeError, match="it answered 401: no; judge.api_key_env is OUR_JUDGE_KEY: look at"
        ) as refused:
            await judge(server, tmp_path, api_key_env="OUR_JUDGE_KEY", swap=False).compare("p", "x", "y")
        assert len(server.requests) == 1 and server.headers[0]["Authorization"] == "Bearer s3cret"
        await judge(server, tmp_path, api_key_env="OUR_JUDGE_KEY", swap=False).compare("p", "x", "y")
        assert "s3cret" not in str(refused.value)
        assert b"s3cret" not in (tmp_path / "judge.sqlite").read_bytes()
        with pytest.raises(JudgeError, match="judge.api_key_env is not set"):
            await judge(server, tmp_path, swap=False).compare("p", "x", "z")

    with_server(lambda request, number: status(401) if number in (1, 3) else "[[A]]", what)


def test_a_request_has_what_extra_says(tmp_path: Path):
    async def what(server: Server) -> None:
        extra = {"max_tokens": None, "max_completion_tokens": 7, "top_p": 0.5}
        await judge(server, tmp_path, swap=False, extra=extra).compare("p", "x", "y")
        request = server.requests[0]
        assert request.pop("messages")[0]["role"] == "user"
        assert request == {"model": "m", "temperature": 0.0, "max_completion_tokens": 7, "seed": 0, "top_p": 0.5}

    with_server(lambda request, number: "[[A]]", what)


@pytest.mark.parametrize(
    ("keys", "said", "rating"),
    [
        ({}, "Not [[2]] but [[ 7.5 ]].", 7.5),
        ({"range": [-1, 1]}, "[[-0.5]]", -0.5),
        ({"pattern": r"Score: (\d+)/10"}, "Score: 4/10", 4.0),
        ({"json_key": "score"}, 'Well: {"why": {"deep": 1}, "score": 6}', 6.0),
        ({"json_key": "score"}, '```json\n{"score": "6"}\n```', 6.0),
    ],
)
def test_ways_to_read_a_number(tmp_path: Path, keys: dict, said: str, rating: float):
    async def what(server: Server) -> None:
        assert await judge(server, tmp_path, form="pointwise", **keys).rate("p", "a") == rating

    with_server(lambda request, number: said, what)


def test_any_text_can_be_judged(tmp_path: Path):
    """Half of a pair of surrogates comes from a tokenizer that cuts between bytes, or from an endpoint's JSON."""

    async def what(server: Server) -> None:
        one = judge(server, tmp_path, form="pointwise")
        for text in ("\0", "{{ x }}", "\ud83d", "\U0001f600", "x" * 100_000):
            assert await one.rate("p", text) == 7.0
            assert await judge(server, tmp_path, form="pointwise").rate("p", text) == 7.0
        assert len(server.requests) == 5

    with_server(lambda request, number: "\ud83d [[7]]", what)


def test_ways_to_read_a_preference(tmp_path: Path):
    async def what(server: Server) -> None:
        one = judge(server, tmp_path, swap=False, json_key="better")
        assert await one.compare("p", "x", "y") == Comparison(0.0, True)
        other = judge(server, tmp_path, swap=False, pattern="better.*?([ABC])", seed=5)
        assert await other.compare("p", "x", "y") == Comparison(0.0, True)

    with_server(lambda request, number: '{"better": "B"}', what)


def test_a_template_of_ones_own_shows_what_it_shows(tmp_path: Path):
    path = tmp_path / "own.jinja"
    path.write_text("{{ prompt }}|{{ a }}|{{ b }}{% if solution %}|{{ solution }}{% endif %}")

    async def what(server: Server) -> None:
        await judge(server, tmp_path, template=path, swap=False).compare("p", "{{ x }}", "y", solution="s")
        assert question(server.requests[0]) == "p|{{ x }}|y|s"

    with_server(lambda request, number: "[[A]]", what)


@pytest.mark.parametrize(
    ("text", "form", "says"),
    [
        ("{{ prompt }} {{ a }}", "pairwise", "does not show b to the judge"),
        ("{{ prompt }}", "pointwise", "does not show answer"),
        ("{{ prompt", "pairwise", "cannot be used: unexpected end"),
        ("{{ question }} {{ a }} {{ b }}", "pairwise", "cannot be used: 'question' is undefined"),
        (None, "pairwise", "cannot be used: .*No such file"),
    ],
)
def test_a_template_that_will_not_do_is_refused(tmp_path: Path, text: str | None, form: str, says: str):
    path = tmp_path / "own.jinja"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=f"reward.template = .*own.jinja {says}"):
        check_template(JudgeKeys(url="http://x/v1", model="m", form=form, template=path), "reward")


@pytest.mark.parametrize("form", ["pairwise", "pointwise"])
def test_the_templates_of_the_package_will_do(form: str):
    check_template(JudgeKeys(url="http://x/v1", model="m", form=form), "reward")


def test_a_variable_with_the_key_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch):
    def check(name: str | None) -> None:
        check_api_key(JudgeKeys(url="http://x/v1", model="m", api_key_env=name), "reward")

    monkeypatch.setenv("OUR_JUDGE_KEY", "s3cret")
    monkeypatch.setenv("VLLM_API_KEY", "s3cret")  # which a run ignores
    check(None)
    check("OUR_JUDGE_KEY")
    with pytest.raises(ConfigError, match="reward.api_key_env = OTHER_JUDGE_KEY: there is no such variable"):
        check("OTHER_JUDGE_KEY")
    with pytest.raises(
        ConfigError, match="reward.api_key_env = VLLM_API_KEY: variables of that name do not reach a run"
    ):
        check("VLLM_API_KEY")


def test_a_cache_that_is_none_is_named(tmp_path: Path):
    (tmp_path / "judge.sqlite").write_text("something else, of a kind that is no database")
    with pytest.raises(JudgeError, match="the cache .*judge.sqlite cannot be used: file is not a database"):
        asyncio.run(judge("http://127.0.0.1:9/v1", tmp_path).compare("p", "x", "y"))
