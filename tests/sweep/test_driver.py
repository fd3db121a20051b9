"""Which runs a sweep starts, in which order, and what it makes of their ends. The runs are stand-ins."""

import json
import signal
import sys
from pathlib import Path

import pytest

from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.launch.progress import progress_of
from megatron_async_rlhf.sweep.driver import Driver, check_directory, parse_only
from megatron_async_rlhf.sweep.points import Sweep

STAND_IN = Path(__file__).with_name("stand_in.py")
AXES = {"beta": {"algorithm.beta": [0.1, 0.2, 0.3]}}


class Rig:
    """Drives sweeps with `stand_in.py`; `calls` are what it was asked, `notes` what the sweep said."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.notes: list[str] = []
        self.behave()

    def behave(self, by_run: dict[str, str] = {}) -> None:
        (self.directory / "behaviour.json").write_text(json.dumps(by_run))

    @property
    def calls(self) -> list[list[str]]:
        path = self.directory / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def drive(self, sweep: Sweep, max_calls: int | None = None) -> tuple[int, list[list[str]]]:
        """The exit code, and the calls of this drive. A second is over with every call."""
        before, self.notes = len(self.calls), []
        driver = Driver(
            sweep,
            note=self.notes.append,
            after_point=lambda: None,
            command=[sys.executable, str(STAND_IN), str(self.directory)],
            clock=lambda: float(len(self.calls)),
        )
        return driver.run(sweep.points, max_seconds=max_calls), self.calls[before:]


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


@pytest.fixture
def three(make) -> Sweep:
    return make({"axes": AXES})


def trained(*labels: str) -> list[list[str]]:
    return [["train", f"beta{label}"] for label in labels]


START = ["sft", "warm_start"]


def test_the_start_comes_first_and_completed_runs_are_not_repeated(rig: Rig, three: Sweep):
    assert rig.drive(three) == (0, [START, *trained("0.1", "0.2", "0.3")])
    assert rig.drive(three) == (0, [])
    assert rig.notes == ["3 of 3 points are completed, 0 to do"]


def test_a_sweep_goes_on_in_pieces(rig: Rig, three: Sweep):
    assert rig.drive(three, max_calls=0) == (130, [])
    assert rig.drive(three, max_calls=2) == (130, [START, *trained("0.1")])
    assert rig.notes[-1].startswith("2 points are left to do")
    assert rig.drive(three, max_calls=2) == (0, trained("0.2", "0.3"))


def test_a_failing_point_does_not_end_the_sweep_and_is_run_again(rig: Rig, three: Sweep):
    rig.behave({"beta0.1": "fail", "beta0.2": "refuse"})
    assert rig.drive(three) == (1, [START, *trained("0.1", "0.2", "0.3")])
    (failed,) = [note for note in rig.notes if note.startswith("beta0.1: failed")]
    assert "learner.0: it went wrong" in failed and "logs/beta0.1.log" in failed
    (refused,) = [note for note in rig.notes if note.startswith("beta0.2: failed")]
    assert "error: something about the input" in refused
    rig.behave()
    assert rig.drive(three) == (0, trained("0.1", "0.2"))


def test_a_failed_piece_is_reported_before_an_unfinished_one(rig: Rig, three: Sweep):
    rig.behave({"beta0.1": "fail"})
    assert rig.drive(three, max_calls=2)[0] == 1


def test_without_its_start_a_sweep_ends(rig: Rig, three: Sweep):
    rig.behave({"warm_start": "fail"})
    assert rig.drive(three) == (1, [START])
    rig.behave()
    assert rig.drive(three)[1][0] == START


def test_a_run_that_was_cut_short_goes_on(rig: Rig, three: Sweep):
    rig.behave({"beta0.2": "interrupt"})
    assert rig.drive(three) == (130, [START, *trained("0.1", "0.2", "0.3")])
    rig.behave()
    assert rig.drive(three) == (0, [["train", "beta0.2", "--resume"]])


def test_a_run_that_was_killed_has_failed_and_goes_on_next_time(rig: Rig, three: Sweep):
    rig.behave({"beta0.2": "die"})
    assert rig.drive(three)[0] == 1
    assert any("beta0.2: failed" in note and "SIGKILL" in note for note in rig.notes)
    rig.behave()
    assert rig.drive(three) == (0, [["train", "beta0.2", "--resume"]])


def test_runs_of_another_configuration_do_not_count(rig: Rig, three: Sweep, make):
    rig.drive(three)
    slower = make({"axes": AXES}, learner={"learning_rate": 1e-5})
    assert {progress_of(point.config).status for point in slower.points} == {"changed"}
    assert rig.drive(slower) == (0, trained("0.1", "0.2", "0.3"))
    other_start = make({"axes": AXES}, warm_start={"steps": 7})
    assert rig.drive(other_start)[1][0] == START


def test_a_program_that_changes_under_a_sweep_is_named(rig: Rig, three: Sweep):
    rig.behave({"beta0.1": "drift"})
    assert rig.drive(three)[0] == 1
    assert any(note.startswith("beta0.1: failed") and "was the program changed" in note for note in rig.notes)


def test_an_interrupt_reaches_the_run_and_ends_the_sweep(rig: Rig, three: Sweep):
    before = signal.getsignal(signal.SIGINT)
    rig.behave({"beta0.1": "ask to stop"})
    assert rig.drive(three) == (130, [START, *trained("0.1")])
    assert any(note.startswith("beta0.1: interrupted") for note in rig.notes)
    assert signal.getsignal(signal.SIGINT) is before
    rig.behave()
    assert rig.drive(three)[1] == [["train", "beta0.1", "--resume"], *trained("0.2", "0.3")]


def test_a_point_that_never_ends_is_ended(rig: Rig, make, monkeypatch: pytest.MonkeyPatch):
    sweep = make({"axes": {"beta": {"algorithm.beta": [0.1]}}, "point_timeout_s": 0.5}, warm_start={"steps": 0})
    rig.behave({"beta0.1": "hang"})
    assert rig.drive(sweep) == (1, trained("0.1"))  # its call is the second that is over
    assert any("sweep.point_timeout_s = 0.5" in note for note in rig.notes)


def test_only_on_the_command_line():
    assert parse_only(["a=x,y", "b=1", "a=z"]) == {"a": ["x", "y", "z"], "b": ["1"]}
    for bad in ("a", "=x", "a="):
        with pytest.raises(ConfigError, match="must look like axis=label"):
            parse_only([bad])


def test_a_runs_directory_is_not_taken_for_a_sweeps(tmp_path: Path):
    check_directory(tmp_path)
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ConfigError, match="choose another run.name"):
        check_directory(tmp_path)
