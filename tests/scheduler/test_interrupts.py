"""A whole run from the controller's side, interrupted in every phase: what it has made is saved."""

import asyncio
import random
from pathlib import Path

import pytest
from scheduler_fakes import FakeGenerator, FakeLearner

from megatron_async_rlhf.checkpoint.run_checkpoints import RunCheckpoints
from megatron_async_rlhf.config.load import load_config
from megatron_async_rlhf.errors import RewardError
from megatron_async_rlhf.jobs.addresses import Addresses
from megatron_async_rlhf.jobs.inputs import load_run_inputs, make_model_template
from megatron_async_rlhf.jobs.train import Job
from megatron_async_rlhf.learner.protocol import Answer, Command, ExportWeights, Score, TrainRollout, TrainSupervised
from megatron_async_rlhf.types import StepMetrics

TINY = Path(__file__).parents[1] / "e2e/tiny.yaml"


class Learner(FakeLearner):
    """Takes every command; `told` is called with each."""

    told = staticmethod(lambda command: None)

    async def execute(self, command: Command) -> Answer:
        self.told(command)
        match command:
            case Score():
                lengths = [len(s.token_ids) - s.prompt_length for s in command.sequences]
                return Answer(id=0, logprobs=[[-1.0] * length for length in lengths])
            case TrainSupervised():
                await asyncio.sleep(0.001)
                return Answer(id=0, metrics=StepMetrics(values={"loss": 1.0}))
        try:
            return await super().execute(command)
        except AssertionError:
            assert not isinstance(command, TrainRollout)
            return Answer(id=0)


class Generator(FakeGenerator):
    async def close(self) -> None:
        pass


class Run:
    """Four steps of tests/e2e/tiny.yaml among fakes."""

    def __init__(self, directory: Path) -> None:
        config = load_config(TINY, [f"run.dir={directory}", "data.eval_prompts=5"])
        directory.mkdir(exist_ok=True)
        make_model_template(config, directory / "model")
        run_inputs = load_run_inputs(config, directory / "model")
        rng = random.Random(0)
        self.learner = Learner(rng)
        self.generator = Generator("generator.0", rng)
        self.job = Job(
            config,
            directory,
            run_inputs,
            self.learner,
            [self.generator],
            Addresses(learner="", transfer=("127.0.0.1", 1)),
            None,
        )
        self.saved = RunCheckpoints(directory).versions

    def __call__(self) -> "Run":
        async def bounded() -> None:
            async with asyncio.timeout(20):
                await self.job.run()

        asyncio.run(bounded())
        return self


def interrupt(run: Run) -> None:
    asyncio.get_running_loop().create_task(run.job.interrupt())


def test_the_warm_start_is_given_up(tmp_path):
    """In its third step; there is nothing to save."""
    run, steps = Run(tmp_path / "run"), []

    def told(command: Command) -> None:
        if isinstance(command, TrainSupervised):
            steps.append(command)
            if len(steps) == 3:
                interrupt(run)

    run.learner.told = told
    run()
    assert run.job.cut_short and run.saved() == [] and len(steps) == 3


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_evaluation_is_given_up(tmp_path, when):
    run = Run(tmp_path / "run")
    held_out, sample = [], run.generator.sample

    async def endless(request):
        if request.held_out and (when == "before" or run.job._controller.version == 4):
            if not held_out:
                interrupt(run)
            held_out.append(request)
            await asyncio.sleep(3600)
        return await sample(request)

    run.generator.sample = endless
    run.generator.wait_queued = lambda count: asyncio.sleep(0)
    run()
    assert held_out and run.job.cut_short
    assert run.saved() == [0 if when == "before" else 4]
    assert when not in run.job.recorder.totals.evaluation


def test_an_interrupt_while_the_policy_is_exported_saves_too(tmp_path):
    run = Run(tmp_path / "run")
    run.learner.told = lambda command: interrupt(run) if isinstance(command, ExportWeights) else None
    run()
    assert run.job.cut_short and run.saved() == [4]


def test_a_run_that_nobody_interrupts_is_exported_before_its_last_evaluation(tmp_path):
    run = Run(tmp_path / "run")
    commands = []
    run.learner.told = commands.append
    run()
    assert not run.job.cut_short and run.saved() == []
    assert list(run.job.recorder.totals.evaluation) == ["before", "after"]
    kinds = [type(command) for command in commands]
    assert kinds.index(ExportWeights) < len(kinds) - 1 - kinds[::-1].index(Score)


def test_a_last_evaluation_that_fails_costs_no_training(tmp_path):
    run = Run(tmp_path / "run")
    evaluate = run.job._controller.evaluate

    async def fails_at_the_end(when):
        if when == "after":
            raise ExceptionGroup("of the tasks", [RewardError("the judge's budget is used up")])
        await evaluate(when)

    run.job._controller.evaluate = fails_at_the_end
    with pytest.raises(BaseExceptionGroup) as failed:
        run()
    assert failed.group_contains(RewardError, match="budget") and run.saved() == [4]
