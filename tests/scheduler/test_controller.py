import asyncio
import json
from collections import Counter
from statistics import fmean

import pytest
from controller_rig import Rig

from megatron_async_rlhf.checkpoint.run_state import read_run_state
from megatron_async_rlhf.config.sections import ScheduleSection
from megatron_async_rlhf.errors import GeneratorError, NonFiniteLossError, StaleSampleError
from megatron_async_rlhf.learner.protocol import TrainRollout
from megatron_async_rlhf.scheduler.pacing import Pacer
from megatron_async_rlhf.scheduler.recording import RecordedRollout
from megatron_async_rlhf.scheduler.weight_sync import PushError


def lines(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("mode", "bound"), [("sync", 5), ("async", 0)])
def test_without_staleness_the_sides_take_turns(tmp_path, mode, bound):
    rig = Rig(tmp_path, mode=mode, max_staleness=bound, steps=3)
    rig.run()
    assert rig.order() == ["0", "p1", "1", "p2", "2", "p3"]
    assert [line["staleness/max"] for line in lines(tmp_path)] == [0, 0, 0]


def test_one_step_off_policy_is_the_schedule_of_the_paper(tmp_path):
    rig = Rig(tmp_path, max_staleness=1, steps=5)
    rig.run()
    assert [line["staleness/mean"] for line in lines(tmp_path)] == [0, 1, 1, 1, 1]
    assert rig.order() == ["0", "p1", "1", "p2", "2", "p3", "3", "p4", "4", "p5"]


@pytest.mark.parametrize("seed", range(20))
def test_any_bound_holds_at_any_speed(tmp_path, seed):
    bound, replicas = seed % 5, 1 + seed % 3
    rig = Rig(tmp_path, seed=seed, replicas=replicas, max_staleness=bound, steps=12)
    rig.run()
    totals = rig.recorder.totals
    assert totals.steps == 12 == rig.learner.version
    assert max(totals.staleness) <= bound
    assert {generator.version for generator in rig.generators} == {12}
    assert totals.samples_generated == 12 * 3 * 2 == totals.samples_trained + totals.samples_not_selected
    seeds = [seed for generator in rig.generators for seed in generator.seeds]
    assert len(set(seeds)) == len(seeds) == 12 * 3


def test_sync_and_zero_staleness_train_on_the_same(tmp_path):
    batches = []
    for mode in ("sync", "async"):
        (tmp_path / mode).mkdir()
        rig = Rig(tmp_path / mode, mode=mode, max_staleness=0)
        rig.run()
        batches.append([c.mini_batches for c in rig.learner.commands if isinstance(c, TrainRollout)])
    assert batches[0] == batches[1]


def test_a_stop_ends_after_the_step_under_way(tmp_path):
    rig = Rig(tmp_path, steps=1000)
    asyncio.run(rig.run_until(version=3))
    assert 3 <= rig.controller.version <= 5


def test_a_failing_generator_ends_the_run(tmp_path):
    rig = Rig(tmp_path)

    async def broken(request):
        raise GeneratorError("generator.0: gone")

    rig.generators[0].sample = broken
    rig.generators[0].wait_queued = lambda count: asyncio.sleep(0)
    with pytest.raises(ExceptionGroup) as caught:
        rig.run()
    assert caught.group_contains(GeneratorError, match="generator.0: gone")


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_when_the_last_generator_is_lost_for_good_what_is_trained_can_be_saved(tmp_path, mode):
    rig = Rig(tmp_path, mode=mode, steps=1000)
    controller = rig.controller

    async def lost(on_return):
        while controller.version < 3:
            await asyncio.sleep(0.001)
        raise GeneratorError("no generator is left")

    controller._pool.watch = lost
    with pytest.raises(GeneratorError, match="^no generator is left$"):
        rig.run()
    trained = [command.version for command in rig.learner.commands if isinstance(command, TrainRollout)]
    assert trained == list(range(controller.state.version)) and controller.state.version >= 3


def explodes(rig: Rig, version: int) -> None:
    """The learner's loss is not finite in the step that starts from this version."""
    execute = rig.learner.execute

    async def explode(command):
        if isinstance(command, TrainRollout) and command.version == version:
            raise NonFiniteLossError(f"step {version + 1}: loss nan")
        return await execute(command)

    rig.learner.execute = explode


def test_the_batch_of_a_non_finite_loss_is_kept_with_the_state_before_it(tmp_path):
    for name in ("failing", "whole"):
        (tmp_path / name).mkdir()
    rig = Rig(tmp_path / "failing", mode="sync")
    explodes(rig, 2)
    with pytest.raises(ExceptionGroup) as caught:
        rig.run()
    told = (
        "step 3: loss nan; the batch is in .*non_finite_batch.json; async-rlhf replay .* --failed makes it come again"
    )
    assert caught.group_contains(NonFiniteLossError, match=told)
    groups = json.loads((tmp_path / "failing/non_finite_batch.json").read_text())
    assert len(groups) == 3 and len(groups[0]["completions"]) == 2
    rollout = RecordedRollout.read(tmp_path / "failing/non_finite_rollout.msgpack")
    assert rollout.command.version == 2 and [group.index for group in rollout.groups] == [6, 7, 8]
    assert [s.token_ids for g in rollout.command.mini_batches[0] for s in g.sequences]

    whole = Rig(tmp_path / "whole", mode="sync")
    whole.run()
    state = read_run_state(tmp_path / "failing/checkpoints/step_000002")
    rest = Rig(tmp_path / "failing", mode="sync", resumed=state)
    rest.run()
    trained = [[c for c in each.learner.commands if isinstance(c, TrainRollout)] for each in (rest, whole)]
    assert trained[0] == trained[1][2:]


def test_what_is_kept_of_a_non_finite_loss_costs_no_older_checkpoint(tmp_path):
    """With the newer one the same loss comes again."""
    rig = Rig(tmp_path, mode="sync", steps=6, checkpoint={"every_steps": 2, "keep_last": 1})
    explodes(rig, 3)
    with pytest.raises(ExceptionGroup):
        rig.run()
    assert [path.name for path in sorted((tmp_path / "checkpoints").glob("step_*"))] == ["step_000002", "step_000003"]


def test_of_several_updates_only_the_batch_is_kept(tmp_path):
    """The first of them has changed the state, perhaps."""
    rig = Rig(tmp_path, mode="sync", epochs=2)
    explodes(rig, 0)
    with pytest.raises(ExceptionGroup) as caught:
        rig.run()
    assert caught.group_contains(NonFiniteLossError, match="non_finite_batch.json$")
    assert not (tmp_path / "non_finite_rollout.msgpack").exists() and not (tmp_path / "checkpoints").exists()


def test_a_batch_that_cannot_be_kept_does_not_hide_the_loss(tmp_path):
    rig = Rig(tmp_path)
    (tmp_path / "non_finite_batch.json").symlink_to("/dev/full")

    async def explode(command):
        raise NonFiniteLossError("step 0: loss nan")

    rig.learner.execute = explode
    with pytest.raises(ExceptionGroup) as caught:
        rig.run()
    told = "step 0: loss nan; .*non_finite_batch.json cannot be written .No space left on device."
    assert caught.group_contains(NonFiniteLossError, match=told)


def test_tokens_outside_the_bound_are_a_bug():
    pacer = Pacer(ScheduleSection(max_staleness=1), version=5)
    assert pacer.staleness(Counter([5, 4, 4])) == {0: 1, 1: 2}
    assert pacer.staleness(Counter()) == {}
    for versions in ([3], [6], [5, 3]):
        with pytest.raises(StaleSampleError, match="max_staleness = 1"):
            pacer.staleness(Counter(versions))


@pytest.mark.parametrize("generation", ["batch", "streaming"])
@pytest.mark.parametrize("seed", range(4))
def test_an_evaluation_sees_one_version_while_training_goes_on(tmp_path, generation, seed):
    rig = Rig(tmp_path, seed=seed, max_staleness=seed, steps=8, eval_every=2, generation=generation, held_out=7)
    rig.run()
    evaluated = {when: n for when, n in rig.recorder.totals.evaluation.items()}
    steps = [int(when.removeprefix("step ")) for when in evaluated]
    assert len(steps) >= 2 and steps == sorted(set(steps)) and all(2 <= step < 8 for step in steps)
    if seed == 0:
        assert steps == [2, 4, 6]
    lines = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert Counter(line["when"] for line in lines) == dict.fromkeys(evaluated, 7)
    for when, metrics in evaluated.items():
        assert metrics["reward"] == pytest.approx(fmean(line["reward"] for line in lines if line["when"] == when))
    assert rig.recorder.totals.samples_generated == 8 * 3 * 2
    assert max(rig.recorder.totals.staleness) <= seed


def lose_pushes(rig: Rig, version: int, times: int) -> None:
    """Of this version so many pushes to the last generator fail although everybody is alive."""
    generator, left = rig.generators[-1], [times]
    receive = generator.receive_weights

    async def receive_weights(*, version: int, **others) -> None:
        if version >= first and left[0]:
            left[0] -= 1
            raise GeneratorError(f"{generator.name}: /async_rlhf/weights answered 500: nothing moved for 15 s")
        await receive(version=version, **others)

    first, generator.receive_weights = version, receive_weights


SCHEDULES = [
    {"mode": "sync"},
    {"max_staleness": 1},
    {"max_staleness": 2, "generation": "streaming"},
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: " ".join(map(str, schedule.values())))
@pytest.mark.parametrize("replicas", [1, 2])
def test_a_push_that_is_lost_is_made_once_more(tmp_path, schedule, replicas):
    rig = Rig(tmp_path, replicas=replicas, steps=6, **schedule)
    lose_pushes(rig, version=2, times=1)
    rig.run()
    totals = rig.recorder.totals
    assert totals.steps == 6 == rig.learner.version
    assert {generator.version for generator in rig.generators} == {6}
    assert max(totals.staleness) <= schedule.get("max_staleness", 0)
    assert totals.samples_generated == 6 * 3 * 2 == totals.samples_trained + totals.samples_not_selected


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: " ".join(map(str, schedule.values())))
def test_two_pushes_lost_in_a_row_end_the_run(tmp_path, schedule):
    rig = Rig(tmp_path, replicas=2, steps=6, **schedule)
    lose_pushes(rig, version=2, times=2)
    with pytest.raises((PushError, ExceptionGroup)) as error:
        rig.run()
    (lost,) = error.value.exceptions if isinstance(error.value, ExceptionGroup) else [error.value]
    assert isinstance(lost, PushError) and "nothing moved for 15 s" in str(lost)
