"""`sft.export: best`: which policy of a fine-tuning that is kept and exported."""

import asyncio
import random
from collections.abc import Callable
from pathlib import Path

from controller_rig import SHAPE
from scheduler_fakes import FakeLearner

from megatron_async_rlhf.checkpoint.run_checkpoints import RunCheckpoints
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.data.report import DataReport
from megatron_async_rlhf.data.solutions import AnsweredRows
from megatron_async_rlhf.jobs.inputs import make_model_template
from megatron_async_rlhf.jobs.sft import SFTJob
from megatron_async_rlhf.jobs.supervised_inputs import SupervisedInputs
from megatron_async_rlhf.learner.protocol import (
    Answer,
    Command,
    EvaluateSupervised,
    ExportWeights,
    ResumeSupervised,
    TrainSupervised,
)
from megatron_async_rlhf.models.architecture import policy_architecture
from megatron_async_rlhf.telemetry.events import EventStream
from megatron_async_rlhf.telemetry.recorder import Recorder
from megatron_async_rlhf.types import Sequence, StepMetrics

ROW = Sequence(token_ids=[1, 2, 3], prompt_length=1)


class Learner(FakeLearner):
    """Has these losses on held-out answers, one after the other.

    Attributes:
        meets: told of every command.
    """

    def __init__(self, losses: list[float]) -> None:
        super().__init__(random.Random(0))
        self.meets: Callable[[Command], None] = lambda command: None
        self.losses = iter(losses)
        self.resumed: list[Path] = []

    async def execute(self, command: Command) -> Answer:
        self.meets(command)
        match command:
            case EvaluateSupervised():
                return Answer(id=0, metrics=StepMetrics(values={"loss": next(self.losses), "tokens": 2.0}))
            case TrainSupervised():
                return Answer(id=0, metrics=StepMetrics(values={"loss": 1.0}))
            case ResumeSupervised():
                self.resumed.append(Path(command.checkpoint))
        try:
            return await super().execute(command)
        except AssertionError:
            return Answer(id=0)


def job_of(directory: Path, losses: list[float], *, steps: int, eval_every: int = 1, **checkpoint: object) -> SFTJob:
    sft = {"steps": steps, "eval_every": eval_every, "export": "best"}
    config = RunConfig.model_validate(
        {"model": SHAPE, "sft": sft, "run": {"dir": str(directory)}, "checkpoint": checkpoint}
    )
    template = directory / "model"
    make_model_template(config, template)
    inputs = SupervisedInputs(
        architecture=policy_architecture(config.model, template),
        train=AnsweredRows(rows=[ROW], unanswered=0, too_long=0),
        held_out=[ROW],
        batches=[[0]] * steps,
        data=DataReport(),
    )
    return SFTJob(config, directory, inputs, Learner(losses), Recorder(config, directory, EventStream()))


def fine_tuned(
    directory: Path, losses: list[float], *, steps: int, eval_every: int = 1, **checkpoint: object
) -> tuple[Learner, list[int], dict[str, float]]:
    """The learner, the checkpoints that are left, and what the summary says of the policy that is exported."""
    job = job_of(directory, losses, steps=steps, eval_every=eval_every, **checkpoint)
    learner, recorder = job._learner, job._recorder
    assert isinstance(learner, Learner)
    asyncio.run(job.run())
    assert list(learner.losses) == []
    return learner, RunCheckpoints(directory).versions(), recorder.totals.evaluation["after"]


def test_the_loss_of_a_checkpoint_is_that_of_its_own_weights(tmp_path):
    """Those of steps without a checkpoint have no part in it."""
    learner, left, after = fine_tuned(tmp_path, [4.0, 2.0, 3.0, 1.0, 1.8, 1.8, 1.0], steps=4)
    assert [path.name for path in learner.resumed] == [RunCheckpoints(tmp_path).path(3).name] and 3 in left
    assert after["loss"] == 1.0


def test_the_best_stays_although_newer_ones_are_saved(tmp_path):
    losses = [4.0, 2.0, 3.0, 1.0, 2.0, 2.0, 2.0, 2.0, 1.0]
    learner, left, _ = fine_tuned(tmp_path, losses, steps=6, every_steps=1, keep_last=1)
    assert left == [3, 6] and [path.name for path in learner.resumed] == [RunCheckpoints(tmp_path).path(3).name]


def test_the_last_is_exported_as_it_is_if_it_is_the_best(tmp_path):
    learner, left, after = fine_tuned(tmp_path, [4.0, 2.0, 1.0, 1.0], steps=2)
    assert not learner.resumed and 2 in left and after["loss"] == 1.0


def test_the_last_counts_although_no_evaluation_was_due(tmp_path):
    learner, left, after = fine_tuned(tmp_path, [4.0, 2.0, 1.9], steps=3, eval_every=2)
    assert not learner.resumed and left == [2] and after["loss"] == 1.9


def test_what_is_interrupted_in_its_last_evaluation_keeps_its_steps(tmp_path):
    """Exported it is not; with --resume nothing is left but to evaluate and export."""
    job, met = job_of(tmp_path, [4.0, 2.0, 2.0], steps=3, eval_every=2), []

    def meets(command: Command) -> None:
        met.append(type(command))
        if met.count(EvaluateSupervised) == 3:
            job.stop()

    job._learner.meets = meets
    assert asyncio.run(job.run()) is True
    assert 3 in RunCheckpoints(tmp_path).versions() and ExportWeights not in met


def test_an_interrupt_during_the_export_comes_too_late(tmp_path):
    job = job_of(tmp_path, [4.0, 2.0, 1.0, 1.0], steps=2)
    job._learner.meets = lambda command: job.stop() if isinstance(command, ExportWeights) else None
    assert asyncio.run(job.run()) is False
