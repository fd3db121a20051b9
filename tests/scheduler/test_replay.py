"""What a replay compares, with a learner that answers what it is told to."""

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

from megatron_async_rlhf.errors import ReplayError
from megatron_async_rlhf.jobs import replay
from megatron_async_rlhf.learner.protocol import Answer, StepMetrics, TrainRollout
from megatron_async_rlhf.scheduler.recording import RolloutLog


def replayed(directory: Path, monkeypatch, **now: float) -> None:
    """Of one step with a rate of 0.5, a loss of 1 and a gradient norm of 2."""
    then = {"learning_rate": 0.5, "loss": 1.0, "grad_norm": 2.0}
    (directory / "metrics.jsonl").write_text(json.dumps({"step": 1, **then}) + "\n")
    RolloutLog(directory / "rollouts").write(TrainRollout(version=0, mini_batches=[[]], epochs=1), [], [])

    class Learner:
        async def execute(self, command) -> Answer:
            return Answer(id=0, steps=[StepMetrics(values=then | now)] if isinstance(command, TrainRollout) else [])

    async def nothing(*arguments) -> None:
        pass

    monkeypatch.setattr(replay, "begin_reinforcement", nothing)
    monkeypatch.setattr(replay, "export_policy", nothing)
    config = SimpleNamespace(schedule=SimpleNamespace(steps=1))
    asyncio.run(replay.run_phases(config, directory, directory, None, Learner(), MagicMock()))


def test_the_same_numbers_pass(tmp_path: Path, monkeypatch):
    replayed(tmp_path, monkeypatch)


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_another_number_is_laid_to_the_machine(tmp_path: Path, monkeypatch, name: str):
    with pytest.raises(ReplayError, match=f"step 1: {name} was .* and is 3.0; layout, precision, threads"):
        replayed(tmp_path, monkeypatch, **{name: 3.0})


def test_another_rate_is_laid_to_the_resumption_that_changed_it(tmp_path: Path, monkeypatch):
    """And not to the numbers that follow from it."""
    with pytest.raises(
        ReplayError, match="learning_rate was 0.5 and is 0.4; the run was resumed with other schedule.steps"
    ):
        replayed(tmp_path, monkeypatch, learning_rate=0.4, loss=3.0)
