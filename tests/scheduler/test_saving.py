"""The loop saves itself and continues from what it saved; the fake learner's files are empty directories."""

import asyncio
import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from controller_rig import Rig

from megatron_async_rlhf.checkpoint.run_checkpoints import RunCheckpoints
from megatron_async_rlhf.checkpoint.run_state import read_run_state
from megatron_async_rlhf.errors import CheckpointError, ConfigError, LearnerError, WriteError
from megatron_async_rlhf.learner.protocol import FinishCheckpoint, SaveCheckpoint, TrainRollout

ALL = {"every_steps": 1, "keep_last": None}


def trained(rig):
    return [command.mini_batches for command in rig.learner.commands if isinstance(command, TrainRollout)]


def go_on(directory, version, **settings):
    state = read_run_state(RunCheckpoints(directory).path(version))
    (directory / "again").mkdir()
    rig = Rig(directory / "again", resumed=state, **settings)
    rig.run()
    return rig


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("version", [1, 3, 6])
def test_without_staleness_the_second_half_is_the_same(tmp_path, mode, version):
    settings = {"mode": mode, "max_staleness": 0, "checkpoint": ALL}
    whole = Rig(tmp_path, **settings)
    whole.run()
    rest = go_on(tmp_path, version, **settings)
    assert trained(rest) == trained(whole)[version:]
    ours, theirs = rest.recorder.totals, whole.recorder.totals
    assert ours.push_s.count == theirs.push_s.count - 1  # of `version`, which the app pushes
    for name in ("steps", "samples_generated", "samples_trained", "tokens_trained", "pairs_skipped", "staleness"):
        assert getattr(ours, name) == getattr(theirs, name), name


@pytest.mark.parametrize("seed", range(12))
def test_the_bound_holds_and_every_batch_counts_once_after_a_resume(tmp_path, seed):
    bound = 1 + seed % 3
    settings = {"max_staleness": bound, "steps": 9, "checkpoint": ALL, "seed": seed}
    whole = Rig(tmp_path, **settings)
    whole.run()
    version = 1 + seed % 8
    state = read_run_state(RunCheckpoints(tmp_path).path(version)).controller
    waiting = [group.index for group in state.ready]
    assert sorted([*waiting, *state.unfinished]) == list(range(3 * version, state.admitted))
    rest = go_on(tmp_path, version, **settings)
    totals = rest.recorder.totals
    assert totals.steps == 9 == rest.learner.version
    assert max(totals.staleness) <= bound
    assert totals.samples_generated == 9 * 3 * 2 == totals.samples_trained + totals.samples_not_selected
    kept = [group.scored.group.prompt.index for group in state.ready]
    assert kept == [rest.prompts.at(index).index for index in waiting]
    seeds = [seed for generator in rest.generators for seed in generator.seeds]
    before = [seed for generator in whole.generators for seed in generator.seeds]
    assert set(seeds) == set(before[3 * version + len(waiting) :])  # what waits is not generated again


def test_a_batch_that_waits_is_saved(tmp_path):
    """With room for three batches ahead and a learner that is slow, some do wait."""
    sizes = set()
    for seed in range(6):
        (tmp_path / str(seed)).mkdir()
        Rig(tmp_path / str(seed), seed=seed, max_staleness=3, steps=8, checkpoint=ALL).run()
        states = [read_run_state(RunCheckpoints(tmp_path / str(seed)).path(v)).controller for v in range(1, 9)]
        sizes |= {len(state.ready) for state in states}
    assert max(sizes) > 0


def names(rig):
    kinds = {SaveCheckpoint: "save", FinishCheckpoint: "asked", TrainRollout: "train"}
    return [kinds[type(command)] for command in rig.learner.commands if type(command) in kinds]


def test_training_goes_on_while_files_are_written(tmp_path):
    rig = Rig(tmp_path, polls=2, steps=4, checkpoint={"every_steps": 3})
    rig.run()
    order = names(rig)
    assert "train" in order[order.index("save") : len(order) - order[::-1].index("asked")]


def test_without_async_save_training_waits(tmp_path):
    rig = Rig(tmp_path, polls=2, steps=4, checkpoint={"every_steps": 1, "async_save": False})
    rig.run()
    assert names(rig) == ["train", "save", "asked", "asked", "asked"] * 4
    snapshots = [command.snapshot for command in rig.learner.commands if isinstance(command, SaveCheckpoint)]
    assert snapshots == [False] * 4


def test_a_save_waits_for_the_one_before(tmp_path):
    rig = Rig(tmp_path, polls=3, steps=5, checkpoint={"every_steps": 1})
    rig.run()
    order = [name for name in names(rig) if name != "train"]
    assert order == ["save", "asked", "asked", "asked", "asked"] * 5


def test_the_reference_is_saved_once(tmp_path):
    rig = Rig(tmp_path, steps=3, checkpoint={"every_steps": 1})
    rig.run()
    saved = [command.reference for command in rig.learner.commands if isinstance(command, SaveCheckpoint)]
    assert saved == [str(tmp_path / "checkpoints/reference.partial"), None, None]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "reference",
        "step_000002",
        "step_000003",
    ]
    assert json.loads((tmp_path / "checkpoints/step_000003/hf/config.json").read_text()) == {"dtype": "float32"}


def rewards(directory):
    return [json.loads(line)["reward"] for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("best", ["highest", "lowest"])
@pytest.mark.parametrize("every", [1, 2])
def test_the_newest_and_the_best_are_kept(tmp_path, best, every):
    keys = {"every_steps": every, "keep_last": 1, "keep_best": "reward", "best": best}
    rig = Rig(tmp_path, seed=3, steps=8, checkpoint=keys)
    rig.run()
    found = rewards(tmp_path)
    means = {v: sum(found[v - every : v]) / every for v in range(every, 9, every)}
    choose = max if best == "highest" else min
    winner = choose(means, key=lambda v: (means[v], v if best == "highest" else -v))
    assert set(RunCheckpoints(tmp_path).versions()) == {winner, 8}


def test_a_metric_that_does_not_come_is_refused_at_the_first_step(tmp_path):
    """A name that no step can have is refused before the start; this one needs a known peak of the device."""
    rig = Rig(tmp_path, checkpoint={"every_steps": 5, "keep_best": "model_flops_utilisation"})

    async def train(command, execute=rig.learner.execute):
        answer = await execute(command)
        if isinstance(command, TrainRollout):
            answer.steps[0].values["num_sequences"] = 3.0
        return answer

    rig.learner.execute = train
    with pytest.raises(ExceptionGroup) as caught:
        rig.run()
    assert caught.group_contains(
        ConfigError, match="checkpoint.keep_best = model_flops_utilisation: .* one of .*reward.*staleness/mean"
    )
    assert rig.learner.version == 1


def test_a_metric_that_only_some_steps_have_is_known_once_seen(tmp_path):
    rig = Rig(tmp_path, checkpoint={"every_steps": 2, "keep_best": "logprob_gap/mean_abs"})
    for metrics in (
        {"num_sequences": 0.0},
        {"num_sequences": 2.0, "logprob_gap/mean_abs": 0.1},
        {"num_sequences": 2.0},
    ):
        rig.saver.observe(metrics)


def test_a_save_that_fails_ends_the_run(tmp_path):
    rig = Rig(tmp_path, steps=50, checkpoint={"every_steps": 2})

    async def full(command, execute=rig.learner.execute):
        if isinstance(command, FinishCheckpoint):
            raise LearnerError("checkpoint x could not be written (learner.0: OSError: no space)")
        return await execute(command)

    rig.learner.execute = full
    with pytest.raises(ExceptionGroup) as caught:
        rig.run()
    assert caught.group_contains(LearnerError, match="checkpoint x could not be written")
    assert RunCheckpoints(tmp_path).versions() == []


@pytest.mark.parametrize("when", [SaveCheckpoint, FinishCheckpoint])
def test_a_save_that_finds_the_disk_full_gives_its_room_back(tmp_path, when):
    rig = Rig(tmp_path, steps=50, checkpoint={"every_steps": 2})

    def saves():
        return sum(isinstance(command, SaveCheckpoint) for command in rig.learner.commands)

    async def full(command, execute=rig.learner.execute):
        answer = await execute(command)
        if isinstance(command, when) and saves() == 2:
            raise WriteError("checkpoint x could not be written (learner.0: OSError: No space left on device)")
        return answer

    rig.learner.execute = full
    with pytest.raises(ExceptionGroup) as caught:
        rig.run()
    assert caught.group_contains(WriteError, match="No space left on device")
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"reference", "step_000002"}


def test_a_controller_that_finds_the_disk_full_gives_the_room_back(tmp_path):
    """Its own file of the checkpoint is the one that has no room."""
    rig = Rig(tmp_path, steps=50, checkpoint={"every_steps": 2})

    async def fill(command, execute=rig.learner.execute):
        answer = await execute(command)
        if isinstance(command, SaveCheckpoint):
            (Path(command.checkpoint) / "run_state.msgpack").symlink_to("/dev/full")
        return answer

    rig.learner.execute = fill
    with pytest.raises(ExceptionGroup) as caught:
        rig.run()
    told = "step_000002 cannot be written .No space left on device.; make room there, then continue with --resume"
    assert caught.group_contains(CheckpointError, match=told)
    assert not list((tmp_path / "checkpoints").iterdir())


def keep_files_in_use(monkeypatch):
    """Deletes as NFS does while somebody reads: the file gets another name, and its directory cannot go."""

    def rmtree(path, ignore_errors=False):
        (path / ".nfs0001").touch()
        if not ignore_errors:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))

    monkeypatch.setattr(shutil, "rmtree", rmtree)


def test_a_checkpoint_that_cannot_be_deleted_does_not_fail_the_next(tmp_path, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        keep_files_in_use(patch)
        rig = Rig(tmp_path, steps=4, checkpoint={"every_steps": 1, "keep_last": 1})
        rig.run()
    places = RunCheckpoints(tmp_path)
    assert places.versions() == [4]
    left = [path for path in (tmp_path / "checkpoints").iterdir() if path.suffix == ".partial"]
    assert len(left) == 3
    warnings = [record.message for record in caplog.records if "cannot be deleted" in record.message]
    assert len(warnings) == 3 and all("Directory not empty" in warning for warning in warnings)
    places.prune(1, None)  # nobody reads any more
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"reference", "step_000004"}


def test_what_a_killed_save_left_is_not_mixed_with_a_new_one(tmp_path, monkeypatch):
    places = RunCheckpoints(tmp_path)
    old = places.partial(places.path(2))
    old.mkdir(parents=True)
    (old / "__7_0.distcp").touch()
    with monkeypatch.context() as patch:
        keep_files_in_use(patch)
        places.remove_leftovers()
    Rig(tmp_path, steps=2, checkpoint={"every_steps": 2}).run()
    assert not (places.path(2) / "__7_0.distcp").exists()
    assert not list((tmp_path / "checkpoints").glob("*.partial"))


def test_a_save_that_never_ends_is_given_up(tmp_path):
    rig = Rig(tmp_path, polls=10**9, steps=50, checkpoint={"every_steps": 2, "timeout_s": 0.2})
    with pytest.raises(ExceptionGroup) as caught:
        rig.run()
    assert caught.group_contains(
        CheckpointError, match="step_000002 was not written within 0.2 s; raise checkpoint.timeout_s"
    )


def test_a_directory_that_cannot_be_completed_is_named(tmp_path):
    rig = Rig(tmp_path, steps=50, checkpoint={"every_steps": 2})
    (tmp_path / "checkpoints/step_000002.partial").parent.mkdir()

    async def lose(command, execute=rig.learner.execute):
        answer = await execute(command)
        if isinstance(command, SaveCheckpoint):
            RunCheckpoints(tmp_path).remove_leftovers()
        return answer

    rig.learner.execute = lose
    with pytest.raises(ExceptionGroup) as caught:
        rig.run()
    assert caught.group_contains(CheckpointError, match="step_000002 cannot be written")


def test_a_stop_leaves_a_state_to_go_on_from(tmp_path):
    rig = Rig(tmp_path, steps=1000, max_staleness=2)

    async def stop_and_save():
        await rig.run_until(version=3)
        async with asyncio.timeout(5):
            await rig.saver.start(rig.controller.state)
            await rig.saver.complete()

    asyncio.run(stop_and_save())
    (version,) = RunCheckpoints(tmp_path).versions()
    assert version == rig.learner.version == rig.recorder.totals.steps
    rest = go_on(tmp_path, version, steps=version + 4, max_staleness=2)
    totals = rest.recorder.totals
    assert totals.steps == version + 4
    assert totals.samples_trained + totals.samples_not_selected == (version + 4) * 3 * 2
    assert totals.samples_generated == (version + 4) * 3 * 2 + totals.samples_cancelled
