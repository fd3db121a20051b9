"""A reward model's server that dies, hangs, is too slow or gives NaN in the middle of a run: the controller, its ledger and the
reward are the real ones."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from controller_rig import SHAPE, Rig
from scoring_server import ScoringServer, serving
from tiny_reward_model import describe_reward_model

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import GeneratorSilentError, RewardError
from megatron_async_rlhf.jobs.reward_models import ServedRewards, load_reward_models
from megatron_async_rlhf.rewards.registry import make_reward
from megatron_async_rlhf.serving import returning

STEPS, GROUPS, SAMPLES = 6, 3, 2
DELAY_S = 0.02  # of an answer: something is under way when the server breaks
SCHEDULES = [{"mode": "sync"}, {"max_staleness": 1}, {"generation": "streaming"}]


@pytest.fixture(autouse=True)
def quick_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(returning, "_WATCH_S", 0.01)


class Supervised:
    """A run with one server of a reward model, and whoever starts that again when it does nothing."""

    def __init__(self, directory: Path, server: ScoringServer, schedule: dict, **keys) -> None:
        describe_reward_model(directory / "reward")
        section = {"type": "reward_model", "model": directory / "reward", "request_timeout_s": 0.4}
        config = RunConfig.model_validate({"model": SHAPE, "reward": section | {"start_timeout_s": 10} | keys})
        reward = make_reward(config.rewards)
        load_reward_models(config, reward, directory)
        self.rig = Rig(directory, reward=reward, steps=STEPS, prompts_per_step=GROUPS, **schedule)
        self.rig.recorder.unresponsive = self._replace
        self.served = ServedRewards(config, reward, [server.url], self.rig.recorder)
        self.directory, self.server, self.replaced = directory, server, []
        server.delay_s = DELAY_S

    def _replace(self, name: str, error: GeneratorSilentError) -> None:
        self.replaced.append(str(error))
        self._replacing = asyncio.create_task(self.start_again())

    async def start_again(self) -> None:
        await self.server.die()
        self.server.behaviour, self.server.delay_s = "answers", DELAY_S
        await self.server.start()

    async def run(self, break_it: Callable[["Supervised"], object]) -> None:
        """`break_it` is called once the server has scored half of all groups: more than there can be before the first step."""

        async def watch() -> None:
            while len(self.server.bodies) < STEPS * GROUPS // 2:
                await asyncio.sleep(0.001)
            if asyncio.iscoroutine(going_on := break_it(self)):
                await going_on

        watching = asyncio.create_task(watch())
        try:
            async with asyncio.timeout(20):
                await self.rig.controller.run()
        finally:
            await watching
            await self.served.close()

    def samples_scored(self) -> int:
        """By the lanes of the trace: a score that was not listened to is not among them."""
        trace = json.loads((self.directory / "trace.json").read_text())
        spans = [event for event in trace["traceEvents"] if event["ph"] == "X" and event["name"] == "score"]
        return sum(event.get("args", {}).get("samples", 0) for event in spans)


async def dies(run: Supervised) -> None:
    await run.start_again()


def hangs(run: Supervised) -> None:
    run.server.behaviour = "hangs"


def is_too_slow(run: Supervised) -> None:
    run.server.behaviour, run.server.delay_s = "slow", 60.0


def gives_nan(run: Supervised) -> None:
    run.server.behaviour = "nan"


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("fault", [dies, hangs, is_too_slow])
def test_no_sample_is_lost_or_scored_twice(tmp_path, fault, schedule):
    async def go() -> Supervised:
        async with serving(1) as (server,):
            run = Supervised(tmp_path, server, schedule)
            await run.run(fault)
            return run

    run = asyncio.run(go())
    run.rig.recorder.close("completed", None)
    totals = run.rig.recorder.totals
    assert run.rig.learner.version == totals.steps == STEPS
    assert totals.samples_cancelled == 0
    assert totals.samples_generated == totals.samples_trained + totals.samples_not_selected == STEPS * GROUPS * SAMPLES
    assert run.samples_scored() == totals.samples_generated
    assert len(run.replaced) == (0 if fault is dies else 1)
    assert all("reward.0: has answered no request for 0.4 s" in why for why in run.replaced)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_a_nan_ends_the_run_with_what_was_trained(tmp_path, schedule):
    async def go() -> Supervised:
        async with serving(1) as (server,):
            run = Supervised(tmp_path, server, schedule)
            with pytest.raises(
                RewardError, match="reward.0: gave a score that is no finite number; the prompt is"
            ) as e:
                await run.run(gives_nan)
            assert "\n" not in str(e.value) and "reward.on_error = zero" in str(e.value)
            return run

    run = asyncio.run(go())
    totals, state = run.rig.recorder.totals, run.rig.controller.state
    assert 0 < run.rig.learner.version == state.version == totals.steps < STEPS
    waiting = sum(len(group.scored.group.completions) for group in state.ready)
    counted = totals.samples_trained + totals.samples_not_selected + totals.samples_cancelled
    assert totals.samples_generated == counted + waiting
    indices = [*(group.index for group in state.ready), *state.unfinished]
    assert sorted(indices) == list(range(GROUPS * state.version, state.admitted))


def test_nan_may_count_as_zero_and_the_run_goes_on(tmp_path):
    async def go() -> Supervised:
        async with serving(1) as (server,):
            run = Supervised(tmp_path, server, {"max_staleness": 1}, on_error="zero")
            await run.run(gives_nan)
            return run

    run = asyncio.run(go())
    run.rig.recorder.close("completed", None)
    totals = run.rig.recorder.totals
    assert totals.steps == STEPS and totals.samples_generated == STEPS * GROUPS * SAMPLES
    assert 0 < totals.rewards_failed < totals.samples_generated
    assert run.samples_scored() == totals.samples_generated - totals.rewards_failed
