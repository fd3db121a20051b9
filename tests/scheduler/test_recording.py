"""Recorded rollouts of runs that were killed at any moment."""

from pathlib import Path

import pytest

from megatron_async_rlhf.errors import CheckpointError
from megatron_async_rlhf.learner.protocol import TrainRollout
from megatron_async_rlhf.scheduler.recording import RolloutLog


def written(directory: Path, count: int) -> RolloutLog:
    """Rollouts of two mini-batches, each gone over twice."""
    log = RolloutLog(directory / "rollouts")
    for number in range(count):
        log.write(TrainRollout(version=4 * number, mini_batches=[[], []], epochs=2), [], [])
    return log


def versions(log: RolloutLog, end: int) -> list[int]:
    return [rollout.command.version for rollout in log.read(end)]


def test_what_was_trained_comes_back(tmp_path):
    log = written(tmp_path, 3)
    assert versions(log, 12) == [0, 4, 8]
    assert versions(log, 11) == [0, 4]  # killed before the last step was noted
    assert versions(log, 0) == []


def test_a_file_that_was_being_written_when_the_run_was_killed_is_no_error(tmp_path):
    log = written(tmp_path, 3)
    last = tmp_path / "rollouts/step_000009.msgpack"
    last.write_bytes(last.read_bytes()[:9])
    assert versions(log, 8) == [0, 4]
    with pytest.raises(CheckpointError, match="step_000009.msgpack is broken"):
        versions(log, 12)


def test_a_run_that_goes_on_forgets_what_it_does_again(tmp_path):
    log = written(tmp_path, 3)
    log.cut(8)
    assert versions(log, 12) == [0, 4]
    (tmp_path / "rollouts/step_000001.msgpack").unlink()
    with pytest.raises(CheckpointError, match="step_000001.msgpack is missing"):
        versions(log, 12)


def test_a_rollout_is_named_by_its_first_step(tmp_path):
    written(tmp_path, 3)
    names = sorted(path.name for path in (tmp_path / "rollouts").iterdir())
    assert names == ["step_000001.msgpack", "step_000005.msgpack", "step_000009.msgpack"]


def test_what_was_recorded_when_steps_were_counted_from_0_can_still_be_read(tmp_path):
    written(tmp_path, 3)
    for path in sorted((tmp_path / "rollouts").iterdir()):
        number = int(path.stem.removeprefix("step_"))
        path.rename(path.with_name(f"step_{number - 1:06d}.msgpack"))
    assert versions(RolloutLog(tmp_path / "rollouts"), 12) == [0, 4, 8]
