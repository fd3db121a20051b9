"""A disk that is full: the file is named in one line, and how the run ended is told all the same.

`/dev/full` stands for such a file: it can be opened, and every write fails as on a full disk.
"""

import io
import json
from pathlib import Path

import pytest

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import WriteError
from megatron_async_rlhf.jobs.lifecycle import EXIT_FAILED, close_failed, close_well
from megatron_async_rlhf.learner.protocol import TrainRollout
from megatron_async_rlhf.scheduler.recording import RolloutLog
from megatron_async_rlhf.telemetry import files
from megatron_async_rlhf.telemetry.events import EventStream
from megatron_async_rlhf.telemetry.recorder import Recorder
from megatron_async_rlhf.types import Completion, Prompt, RolloutGroup, Span

MODEL = {"layers": 2, "hidden_size": 64, "ffn_size": 96, "heads": 2, "context_length": 96}
VALUES = {"reward": 0.5, "loss": 0.1, "staleness/mean": 0.0}
GROUP = RolloutGroup(
    prompt=Prompt(index=0, text="say", token_ids=[1], reference={}),
    completions=[Completion(token_ids=[2], logprobs=[-1.0], versions=[0], finished=True, text="so")],
    rewards=[1.0],
)
WRITES = {
    files.METRICS: lambda recorder: recorder.step(0, VALUES),
    files.SAMPLES: lambda recorder: recorder.samples(0, [(GROUP, [{}])]),
    files.WARM_START: lambda recorder: recorder.warm_start_step(0, {"loss": 1.0}, []),
    files.EVALUATIONS: lambda recorder: recorder.evaluation_samples("before", [GROUP]),
    files.FAILED_BATCH: lambda recorder: recorder.save_json(files.FAILED_BATCH, [GROUP]),
    files.SUMMARY: lambda recorder: recorder.step(0, VALUES),
}


class Run:
    """A recorder, and what it says on the pipe."""

    def __init__(self, directory: Path, *full: str) -> None:
        self.directory, self.pipe = directory, io.StringIO()
        for name in full:
            (directory / name).symlink_to("/dev/full")
        config = RunConfig.model_validate({"model": MODEL})
        self.recorder = Recorder(config, directory, EventStream(self.pipe))

    @property
    def closed(self) -> dict:
        event = json.loads(self.pipe.getvalue().splitlines()[-1])
        assert event["event"] == "closed"
        return event

    @property
    def summary(self) -> dict:
        return json.loads((self.directory / files.SUMMARY).read_text())


def line_of(path: Path) -> str:
    return f"{path} cannot be written (No space left on device); make room there, then continue with --resume"


@pytest.mark.parametrize("name", WRITES)
def test_every_file_of_a_run_is_named(tmp_path: Path, name: str):
    run = Run(tmp_path, f"{name}.partial" if name == files.SUMMARY else name)
    with pytest.raises(WriteError) as caught:
        WRITES[name](run.recorder)
    assert str(caught.value) == line_of(tmp_path / name)


def test_a_recorded_rollout_is_named(tmp_path: Path):
    path = tmp_path / "rollouts/step_000003.msgpack"
    path.parent.mkdir()
    path.symlink_to("/dev/full")
    with pytest.raises(WriteError) as caught:
        RolloutLog(path.parent).write(TrainRollout(version=2, mini_batches=[], epochs=1), [], [])
    assert str(caught.value) == line_of(path)


@pytest.mark.parametrize("status", ["completed", "interrupted"])
def test_a_run_whose_timeline_has_no_room_has_failed(tmp_path: Path, status: str):
    run = Run(tmp_path, f"{files.TRACE}.partial")
    assert close_well(run.recorder, status) == EXIT_FAILED
    error = line_of(tmp_path / files.TRACE)
    assert (run.summary["status"], run.summary["error"]) == ("failed", error)
    assert (run.closed["status"], run.closed["error"], run.closed["explained"]) == ("failed", error, True)


def test_an_old_timeline_is_kept_until_the_new_one_is_whole(tmp_path: Path):
    (tmp_path / files.TRACE).write_text("{}")
    run = Run(tmp_path, f"{files.TRACE}.partial")
    run.recorder.generators_were_busy(Span(name="generate", start=0.0, end=1.0))
    assert not run.recorder.close("failed", "no generator is left")
    assert run.summary["error"] == "no generator is left"  # the first cause
    assert (tmp_path / files.TRACE).read_text() == "{}"


def test_a_summary_without_room_goes_to_the_supervisor(tmp_path: Path):
    run = Run(tmp_path, files.METRICS)
    with pytest.raises(WriteError) as caught:
        run.recorder.step(7, VALUES)
    run.recorder.totals.steps = 8
    (tmp_path / f"{files.SUMMARY}.partial").symlink_to("/dev/full")
    assert close_failed(run.recorder, caught.value) == EXIT_FAILED
    assert not (tmp_path / files.SUMMARY).exists()
    told = run.closed["summary"]
    assert (told["status"], told["steps"]) == ("failed", 8)
    assert told["error"] == run.closed["error"] == line_of(tmp_path / files.METRICS)
