"""A user's function in worker processes: what it is given, and everything that it can do wrong."""

import asyncio
import os
import signal
import time
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from pebble import ProcessPool

from megatron_async_rlhf.config.rewards import FunctionRewardSection, Gsm8kRewardSection
from megatron_async_rlhf.errors import ConfigError, RewardError
from megatron_async_rlhf.rewards import workers
from megatron_async_rlhf.rewards.base import Reward, Score
from megatron_async_rlhf.rewards.function import FunctionReward, check_function
from megatron_async_rlhf.rewards.registry import make_reward
from megatron_async_rlhf.types import Completion, Prompt
from megatron_async_rlhf.user_functions import split_name

OWN = """
import asyncio, os, sys, time
from pathlib import Path
import numpy
import neighbour

def lengths(completions):
    return [len(text) for text in completions]

def told(prompt, completions, *, level, bonus=0.0):
    print("a reward function may print")
    return [level * len(prompt) + bonus] * len(completions)

def array(completions, **everything):
    return numpy.array([len(everything)] * len(completions), dtype=numpy.float32)

async def later(completions):
    await asyncio.sleep(0.01)
    return [neighbour.VALUE] * len(completions)

def meets(completions, directory, count):
    Path(directory, f"{os.getpid()}.came").touch()
    while len(list(Path(directory).glob("*.came"))) < count:
        time.sleep(0.01)
    return [1] * len(completions)

def raises(completions): raise ValueError("no\\nidea")
def leaves(completions): sys.exit(3)
def hangs(completions): time.sleep(1000)
def slow(completions): time.sleep(1.5); return [1.0] * len(completions)
def nan(completions): return [0.0, float("nan")]
def text(completions): return ["good", "bad"]
def nothing(completions): return None
def one(completions): return [1.0]
def number(completions): return 3.0
def lines(completions): return "12"
def dies(completions): os._exit(9)

def dies_once(completions, notes):
    if not Path(notes).exists():
        Path(notes).touch()
        os._exit(9)
    return [1.0, 2.0]

def positional(completions, /): return []
def without(prompt): return []
value = 3
"""
PROMPT = Prompt(index=4, text="Say it.", token_ids=[1], reference={"level": 2, "answer": "a"}, origin="train.jsonl:5")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "neighbour.py").write_text("VALUE = 7\n")
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return path


def completions(*texts: str) -> list[Completion]:
    return [Completion(token_ids=[1], logprobs=[0.0], versions=[0], finished=True, text=text) for text in texts]


def scores(reward: Reward, *texts: str) -> list[Score]:
    async def go() -> list[Score]:
        try:
            return await reward.score(PROMPT, completions(*texts))
        finally:
            reward.close()

    return asyncio.run(go())


def reward_of(own: Path, name: str, **keys: object) -> FunctionReward:
    return FunctionReward(FunctionRewardSection(function=f"{own}:{name}", **{"workers": 1, "timeout_s": 20.0, **keys}))


def test_the_function_gets_what_it_has_parameters_for(own: Path, capfd: pytest.CaptureFixture):
    assert [score.reward for score in scores(reward_of(own, "lengths"), "a", "", "four")] == [1.0, 0.0, 4.0]
    told = scores(reward_of(own, "told", kwargs={"bonus": 0.5}), "a", "b")
    assert told == [Score(reward=14.5, metrics={})] * 2
    everything = {"prompt", "level", "answer", "extra"}
    assert scores(reward_of(own, "array", kwargs={"extra": 1}), "a")[0].reward == len(everything)
    assert scores(reward_of(own, "later"), "a", "b")[1].reward == 7.0
    printed, log = capfd.readouterr()
    assert "a reward function may print" in log and printed == ""


def test_a_module_is_found_in_the_working_directory(own: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(own.parent)
    assert scores(FunctionReward(FunctionRewardSection(function="own.lengths", workers=1)), "abc")[0].reward == 3.0
    assert split_name("a.b.c") == split_name("a.b:c") == ("a.b", "c")
    assert split_name("x/v.1.py:c") == ("x/v.1.py", "c")


WRONG = {
    "raises": r"raised ValueError: no idea \(own.py, line \d+\)",
    "leaves": r"raised SystemExit: 3 \(own.py",
    "hangs": "did not return within reward.timeout_s = 1",
    "nan": "returned nan and not a finite number for completion 2 of 2",
    "text": "returned 'good' and not a finite number for completion 1 of 2",
    "nothing": "returned None and not a list with a number for each completion",
    "number": "returned 3.0 and not a list",
    "lines": "returned '12' and not a list",
    "one": "returned 1 scores for 2 completions",
    "dies": "ended its process 2 times, with exit code 9",
}


@pytest.mark.parametrize("name", WRONG)
def test_what_it_does_wrong_is_one_line_or_counts_as_zero(own: Path, name: str):
    limit = {"timeout_s": 1.0} if name == "hangs" else {}
    line = rf"reward function .*own.py:{name} {WRONG[name]}.*; the prompt is train.jsonl:5 \('Say it.'\)\. Correct"
    with pytest.raises(RewardError, match=line) as failed:
        scores(reward_of(own, name, **limit), "a", "b")
    assert "\n" not in str(failed.value) and "reward.on_error = zero" in str(failed.value)
    for score in scores(reward_of(own, name, **limit, on_error="zero"), "a", "b"):
        assert (score.reward, score.metrics) == (0.0, {"reward_failed": 1.0})
        assert WRONG[name].split(r" \(")[0] in score.failure


def test_a_worker_that_somebody_ends_is_replaced(own: Path, tmp_path: Path):
    reward = reward_of(own, "dies_once", kwargs={"notes": str(tmp_path / "died")}, on_error="zero")
    assert scores(reward, "a", "b") == [Score(reward=x, metrics={"reward_failed": 0.0}) for x in (1.0, 2.0)]


def test_a_worker_that_ends_while_it_has_nothing_to_do_is_replaced(own: Path):
    async def go() -> None:
        before = workers_of_this_process()
        reward = reward_of(own, "lengths", workers=2)
        for _ in range(3):
            calls = (reward.score(PROMPT, completions("ab")) for _ in range(6))
            assert await asyncio.gather(*calls) == [[Score(reward=2.0, metrics={})]] * 6
            for pid in workers_of_this_process() - before:
                os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(0.5)
        reward.close()

    asyncio.run(go())


def test_a_pool_from_which_nothing_comes_is_replaced(own: Path, monkeypatch: pytest.MonkeyPatch):
    """As when pebble itself hangs."""
    monkeypatch.setattr(workers, "_SLACK_S", 0.0)
    hanging = []

    def schedule(self, *arguments, **keys):
        hanging.append(self)
        return Future()

    async def go() -> list[Score]:
        reward = reward_of(own, "lengths", timeout_s=3.0)
        await reward.score(PROMPT, completions("a"))
        with monkeypatch.context() as patched:
            patched.setattr(ProcessPool, "schedule", schedule)
            call = asyncio.create_task(reward.score(PROMPT, completions("ab")))
            while not hanging:
                await asyncio.sleep(0.01)
        try:
            return await call
        finally:
            reward.close()

    assert asyncio.run(go()) == [Score(reward=2.0, metrics={})]


@pytest.mark.parametrize("hours", [30, -2])
def test_a_clock_that_is_set_ends_no_call(own: Path, monkeypatch: pytest.MonkeyPatch, hours: int):
    real = time.time

    async def go() -> list[Score]:
        reward = reward_of(own, "slow")
        await reward.score(PROMPT, completions("a"))
        call = asyncio.create_task(reward.score(PROMPT, completions("ab")))
        await asyncio.sleep(0.5)  # a worker has it
        with monkeypatch.context() as patched:
            patched.setattr(time, "time", lambda: real() + 3600 * hours)
            try:
                return await call
            finally:
                reward.close()

    assert asyncio.run(go()) == [Score(reward=1.0, metrics={})]


def test_as_many_calls_run_at_once_as_there_are_workers_while_the_event_loop_goes_on(own: Path, tmp_path: Path):
    """Each call waits until as many others have begun; the first ones all find no worker yet."""

    async def go() -> int:
        reward = reward_of(own, "meets", workers=3, kwargs={"directory": str(tmp_path), "count": 3})
        calls = asyncio.gather(*(reward.score(PROMPT, completions("a")) for _ in range(3)))
        turns = 0
        while not calls.done():
            await asyncio.sleep(0)
            turns += 1
        assert await calls == [[Score(reward=1.0, metrics={})]] * 3
        workers = len(workers_of_this_process())
        reward.close()
        assert workers == 3
        return turns

    assert asyncio.run(go()) > 100


def test_a_call_that_nobody_waits_for_any_more_is_given_up(own: Path):
    """As a group that is sampled anew."""

    async def go() -> None:
        reward = reward_of(own, "hangs", timeout_s=100.0)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(2.0):
                await reward.score(PROMPT, completions("a"))
        await asyncio.wait_for(asyncio.to_thread(reward.close), 15.0)

    asyncio.run(go())


UNUSABLE = {
    "absent": "cannot be loaded: .*own.py has no absent",
    "value": "is no function, but int",
    "positional": "cannot be given completions by name",
    "without": "has no parameter `completions`",
    "dies_once": "needs notes, and is given answer, completions, level, prompt; other values",
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_before_the_run_it_is_imported_and_its_parameters_are_looked_at(own: Path, name: str):
    with pytest.raises(ConfigError, match=f"reward.function = .*own.py:{name} {UNUSABLE[name]}") as refused:
        check_function("reward", FunctionRewardSection(function=f"{own}:{name}"), [PROMPT.reference])
    assert "\n" not in str(refused.value)


def test_a_parameter_without_default_needs_a_column_of_all_prompts(own: Path):
    section = FunctionRewardSection(function=f"{own}:told")
    check_function("reward", section, [{"level": 1}, {"level": 2, "answer": 3}])
    with pytest.raises(ConfigError, match="needs level"):
        check_function("reward", section, [{"level": 1}, {"answer": 3}])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("import nowhere_to_be_found", r"raised ModuleNotFoundError: .* \(broken.py, line 1\) while it was imported"),
        ("x = (", "raised SyntaxError: .* while it was imported"),
        ("import sys; sys.exit()", "raised SystemExit .*while it was imported"),
        ("import time; time.sleep(100)", "did not return within reward.timeout_s = 2"),
        ("import os; os._exit(1)", "ended its process 2 times, with exit code 1"),
        (None, "cannot be loaded: there is no file /.*broken.py"),
    ],
)
def test_an_import_that_fails_is_one_line(tmp_path: Path, text: str | None, says: str):
    path = tmp_path / "broken.py"
    if text is not None:
        path.write_text(text + "\n")
    with pytest.raises(ConfigError, match=says) as refused:
        check_function("reward", FunctionRewardSection(function=f"{path}:score", timeout_s=2.0), [{}])
    assert "\n" not in str(refused.value)


def test_kwargs_are_parameters(own: Path):
    section = FunctionRewardSection(function=f"{own}:lengths", kwargs={"bonus": 1})
    with pytest.raises(ConfigError, match="reward.kwargs.bonus: the function has no such parameter, only completions"):
        check_function("reward", section, [{}])


def test_rewards_are_summed_by_weight_and_named(own: Path):
    prompt = Prompt(index=0, text="", token_ids=[1], reference={"solution": "#### 1"})
    entries = [
        Gsm8kRewardSection(weight=2.0),
        FunctionRewardSection(function=f"{own}:lengths", weight=-0.1, name="brevity", on_error="zero", workers=1),
    ]
    reward = make_reward(entries)
    reward.check(prompt)

    async def go() -> list[Score]:
        try:
            return await reward.score(prompt, completions("#### 1", "#### 25"))
        finally:
            reward.close()

    right, wrong = asyncio.run(go())
    assert right.reward == pytest.approx(2.0 - 0.6) and wrong.reward == pytest.approx(0.2 - 0.7)
    assert right.metrics == {
        "reward/gsm8k": 1.0,
        "gsm8k/exact": 1.0,
        "gsm8k/well_formed": 1.0,
        "reward/brevity": 6.0,
        "brevity/reward_failed": 0.0,
    }


def test_a_weight_counts_for_a_single_reward_too(own: Path):
    (score,) = scores(make_reward([FunctionRewardSection(function=f"{own}:lengths", weight=3.0, workers=1)]), "ab")
    assert score == Score(reward=6.0, metrics={})


def workers_of_this_process() -> set[int]:
    found = set()
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # also a process that has ended, but whose parent has not waited for it
            if "spawn_main" in " ".join(child.cmdline()):
                found.add(child.pid)
    return found


def test_no_worker_outlives_its_reward(own: Path):
    async def go() -> int:
        reward = reward_of(own, "lengths", workers=2)
        await reward.score(PROMPT, completions("a"))
        started = len(workers_of_this_process() - before)
        reward.close()
        return started

    before = workers_of_this_process()
    assert asyncio.run(go()) == 2
    assert workers_of_this_process() == before
