"""Held-out evaluations on the way: nobody waits for their scores, and none is lost."""

import asyncio

import pytest
from controller_rig import LengthReward, Rig

from megatron_async_rlhf.checkpoint.run_checkpoints import RunCheckpoints
from megatron_async_rlhf.checkpoint.run_state import RunState, read_run_state
from megatron_async_rlhf.errors import RewardError

EVALUATED = {"steps": 8, "eval_every": 4, "held_out": 4}
SCHEDULES = [
    {"mode": "sync"},
    {"mode": "async", "max_staleness": 1},
    {"mode": "sync", "generation": "streaming"},
    {"mode": "async", "max_staleness": 1, "generation": "streaming"},
]
schedules = pytest.mark.parametrize("schedule", SCHEDULES, ids=str)


class WaitsWithHeldOut(LengthReward):
    """Scores held-out completions only once the learner has come to a version, and a little later."""

    def __init__(self, version: int) -> None:
        self.version, self.rig = version, None

    async def score(self, prompt, completions):
        if len(completions) == 1:  # of a prompt that is trained there are more
            while self.rig.learner.version < self.version:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.02)
        return await super().score(prompt, completions)


class FailsHeldOut(LengthReward):
    async def score(self, prompt, completions):
        if len(completions) == 1:
            raise RewardError(f"no score for {prompt.name}")
        return await super().score(prompt, completions)


@schedules
def test_training_goes_on_and_the_end_waits_while_answers_are_scored(tmp_path, schedule):
    reward = WaitsWithHeldOut(version=8)
    rig = reward.rig = Rig(tmp_path, reward=reward, **EVALUATED, **schedule)
    rig.run()
    assert list(rig.recorder.totals.evaluation) == ["step 4"]


@pytest.mark.parametrize("schedule", [each for each in SCHEDULES if each["mode"] == "sync"], ids=str)
def test_a_checkpoint_has_the_evaluation_that_was_due_before_it(tmp_path, schedule):
    """Else a run that continues from there would evaluate other weights."""
    reward = WaitsWithHeldOut(version=5)
    rig = reward.rig = Rig(tmp_path, reward=reward, checkpoint={"every_steps": 5}, **EVALUATED, **schedule)
    rig.run()
    saved = read_run_state(RunCheckpoints(tmp_path).path(5))
    assert saved.controller.evaluated == 4 and list(saved.totals.evaluation) == ["step 4"]


@schedules
def test_an_evaluation_that_could_not_be_scored_is_made_again(tmp_path, schedule):
    rig = Rig(tmp_path, reward=FailsHeldOut(), **EVALUATED, **schedule)
    with pytest.raises(RewardError, match="no score for prompt"):
        rig.run()
    state, totals = rig.controller.state, rig.recorder.totals
    assert 4 <= state.version < 8 and state.evaluated == 0 and not totals.evaluation
    counted = totals.samples_trained + totals.samples_not_selected + totals.samples_cancelled
    assert totals.samples_generated == counted + sum(len(group.scored.group.completions) for group in state.ready)
    (tmp_path / "again").mkdir()
    resumed = RunState(controller=state, totals=totals, metric=None, scores={})
    again = Rig(tmp_path / "again", resumed=resumed, **EVALUATED, **schedule)
    again.run()
    assert list(again.recorder.totals.evaluation) == [f"step {state.version}"]


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_generators_that_stayed_sample_a_rollout_and_the_held_out_prompts_together(tmp_path, mode):
    """As those that were started anew do, although it is known before the first push that an evaluation is due."""
    whole = Rig(tmp_path, eval_every=2, held_out=4, checkpoint={"every_steps": 2, "keep_last": None}, mode=mode)
    whole.run()
    batches = {}
    for stayed in (False, True):
        directory = tmp_path / f"{stayed}"
        directory.mkdir()
        saved = read_run_state(RunCheckpoints(tmp_path).path(2))
        rig = Rig(directory, eval_every=2, held_out=4, mode=mode, resumed=saved)
        batches[stayed] = asyncio.run(sampled_together(rig, stayed))
    assert batches[True] == batches[False]


async def sampled_together(rig: Rig, stayed: bool) -> list[int]:
    """How many requests each call had, of which there may be one at a time."""
    pool, calls, running = rig.controller._pool, [], []
    original = pool.sample_together

    async def sample_together(requests, *arguments):
        assert not running
        running.append(requests)
        calls.append(len(requests))
        try:
            return await original(requests, *arguments)
        finally:
            running.clear()

    pool.sample_together = sample_together
    if stayed:
        await pool.rejoin(lambda generator: None)
    async with asyncio.timeout(20):
        await rig.controller.run()
    return calls
