"""A reward that fails ends the run in order: what was trained is saved, and all samples are accounted for."""

import asyncio

import pytest
from controller_rig import LengthReward, Rig

from megatron_async_rlhf.checkpoint.run_checkpoints import RunCheckpoints
from megatron_async_rlhf.checkpoint.run_state import read_run_state
from megatron_async_rlhf.errors import RewardError
from megatron_async_rlhf.rewards.base import Score

SETTINGS = {"steps": 6, "prompts_per_step": 3, "checkpoint": {"every_steps": 1, "keep_last": None}}


class FailsAt(LengthReward):
    """At the `number`-th prompt, after a moment; before that as long as it takes to be overtaken."""

    def __init__(self, number: int, *, with_zero: bool = False) -> None:
        self.asked, self.number, self.with_zero = 0, number, with_zero

    async def score(self, prompt, completions):
        self.asked += 1
        fails = self.asked == self.number
        await asyncio.sleep(0.002 * (self.asked % 3))
        if fails and self.with_zero:
            return [Score(reward=0.0, metrics={}, failure="it failed") for _ in completions]
        if fails:
            raise RewardError(f"no score for {prompt.name}")
        return await super().score(prompt, completions)


@pytest.mark.parametrize("schedule", [{"mode": "sync"}, {"max_staleness": 1}, {"generation": "streaming"}], ids=str)
@pytest.mark.parametrize("number", [1, 8, 18])
def test_what_was_trained_can_be_saved_and_gone_on_with(tmp_path, schedule, number):
    rig = Rig(tmp_path, reward=FailsAt(number), **SETTINGS, **schedule)
    with pytest.raises(RewardError, match="no score for prompt"):
        rig.run()
    totals, state = rig.recorder.totals, rig.controller.state
    assert rig.learner.version == state.version == totals.steps < 6
    waiting = sum(len(group.scored.group.completions) for group in state.ready)
    counted = totals.samples_trained + totals.samples_not_selected + totals.samples_cancelled
    assert totals.samples_generated == counted + waiting
    indices = [*(group.index for group in state.ready), *state.unfinished]
    assert sorted(indices) == list(range(3 * state.version, state.admitted))
    if state.version == 0:
        return
    (tmp_path / "again").mkdir()
    saved = read_run_state(RunCheckpoints(tmp_path).path(state.version))
    rest = Rig(tmp_path / "again", resumed=saved, **SETTINGS, **schedule)
    rest.run()
    assert rest.learner.version == rest.recorder.totals.steps == 6


def test_failures_that_count_as_zero_are_counted(tmp_path):
    rig = Rig(tmp_path, reward=FailsAt(4, with_zero=True), **SETTINGS)
    rig.run()
    assert rig.recorder.totals.rewards_failed == 2
    assert rig.recorder.totals.to_summary("completed", None)["rewards_failed"] == 2


def test_an_evaluation_that_cannot_be_scored_says_so(tmp_path):
    rig = Rig(tmp_path, reward=FailsAt(2), held_out=4)
    with pytest.raises(BaseExceptionGroup) as failed:
        asyncio.run(rig.controller.evaluate("before"))
    assert failed.group_contains(RewardError, match="no score")
