"""The supervisor over real processes that only stand there: what becomes of the run when one of them dies."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from process_tree import lives
from rich.console import Console

from megatron_async_rlhf.checkpoint.run_checkpoints import RunCheckpoints
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.formats.file_digests import write_digests
from megatron_async_rlhf.launch.display import Display
from megatron_async_rlhf.launch.fleet import Fleet
from megatron_async_rlhf.launch.floating import FloatingProcesses
from megatron_async_rlhf.launch.plan import ProcessPlan, ProcessSpec
from megatron_async_rlhf.launch.supervisor import _SETTLE_S, Supervisor
from megatron_async_rlhf.telemetry.events import LAST_PHASE
from megatron_async_rlhf.telemetry.files import PROCESSES, RESERVE

MODEL = {"layers": 2, "hidden_size": 64, "ffn_size": 96, "heads": 2, "context_length": 96}
STAND = "import time; print('up', flush=True); time.sleep(600)"
RANK = (
    "import faulthandler, signal, sys; faulthandler.register(signal.SIGUSR1); "
    "signal.signal(signal.SIGTERM, lambda *_: sys.exit(1)); " + STAND
)
LIMIT_S = 30
# Tells that training has begun, and ends well once the file `end` is there, badly with `fail`. Tells what stands in `tell`.
CONTROLLER = """
import json, pathlib, sys, time
print(json.dumps({"event": "phase", "name": sys.argv[2]}), flush=True)
tell = pathlib.Path(sys.argv[1], "tell")
while not pathlib.Path(sys.argv[1], "end").exists():
    time.sleep(0.02)
    if pathlib.Path(sys.argv[1], "fail").exists():
        print(json.dumps({"event": "closed", "status": "failed", "error": "the learner did not answer"}), flush=True)
        sys.exit(1)
    if tell.exists():
        print(tell.read_text(), flush=True)
        tell.unlink()
"""
# Fills the disk, and then tells what it could not write down.
FILLING_CONTROLLER = """
import json, pathlib, sys, time
print(json.dumps({"event": "phase", "name": "train"}), flush=True)
directory = pathlib.Path(sys.argv[1])
while not pathlib.Path(sys.argv[2]).exists(): time.sleep(0.02)
error = "metrics.jsonl cannot be written"
with (directory / "filling").open("wb", buffering=0) as file:
    try:
        while file.write(bytes(1000)): pass
    except OSError: pass
closed = {"status": "failed", "error": error, "explained": True, "summary": {"steps": 3}}
print(json.dumps({"event": "closed", **closed}), flush=True)
sys.exit(1)
"""


def process(name: str, *arguments: str, restarts: int = 0) -> ProcessSpec:
    return ProcessSpec(
        name=name,
        arguments=[sys.executable, "-c", *arguments],
        environment={},
        cores=[],
        restarts=restarts,
        restarts_key=f"{name.partition('.')[0]}.restarts",
    )


class Run:
    """A supervised run in a thread of its own, as `signal.signal` allows nowhere but in the first."""

    def __init__(
        self,
        directory: Path,
        monkeypatch,
        *,
        restarts: int,
        phase: str = "train",
        controller: tuple[str, ...] = (CONTROLLER,),
        on_request: tuple[str, ...] = (),
        cut_back: Callable[[int], None] | None = None,
        taken: Callable[[], str | None] = lambda: None,
    ) -> None:
        monkeypatch.setattr(signal, "signal", lambda number, handler: handler)
        self.directory, self.output = directory, io.StringIO()
        plan = ProcessPlan(
            learners=[process(f"learner.{i}", RANK) for i in range(2)],
            generators=[process(f"generator.{i}", STAND, restarts=restarts) for i in range(2)],
            rewards=[process("reward.0", STAND, restarts=restarts)],
            controller=process("controller", controller[0], str(directory), *(controller[1:] or [phase])),
            on_request={name: [process(f"{name}.{i}", STAND) for i in range(2)] for name in on_request},
        )
        config = RunConfig.model_validate({"model": MODEL, "launch": {"shutdown_grace_s": 1.0}})
        display = Display(Console(file=self.output, width=500))
        supervisor = Supervisor(config, plan, directory, display, Fleet(list), cut_back=cut_back, taken=taken)
        self.thread = threading.Thread(target=lambda: setattr(self, "code", supervisor.run()))
        self.thread.start()
        self.wait(lambda: phase in self.output.getvalue())
        self.wait(lambda: all("up" in self.log(name) for name in ("generator.1", "reward.0", "learner.0", "learner.1")))

    def wait(self, condition) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            assert time.monotonic() < deadline, self.output.getvalue()
            time.sleep(0.02)

    @property
    def pids(self) -> dict[str, int]:
        written = json.loads((self.directory / PROCESSES).read_text())
        assert written.keys() - {"machines"} == written.pop("machines").keys()
        return written

    def log(self, name: str) -> str:
        path = self.directory / f"logs/{name}.log"
        return path.read_text() if path.exists() else ""

    def kill(self, name: str) -> int:
        """Returns the process id it had."""
        pid = self.pids[name]
        os.kill(pid, signal.SIGKILL)
        return pid

    def report_silent(self, name: str, since: float) -> None:
        """As the controller does of a generator that has done nothing since then."""
        self.tell({"event": "unresponsive", "name": name, "since": since, "why": f"{name}: has answered no request"})

    def request(self, name: str) -> None:
        """As the controller does that needs the servers of another model."""
        self.tell({"event": "serve", "name": name})

    def tell(self, event: dict) -> None:
        (self.directory / "new").write_text(json.dumps(event))
        (self.directory / "new").rename(self.directory / "tell")
        self.wait(lambda: not (self.directory / "tell").exists())

    def end(self) -> int:
        (self.directory / "end").touch()
        return self.join()

    def join(self) -> int:
        self.thread.join(LIMIT_S)
        assert not self.thread.is_alive()
        return self.code


def test_a_generator_is_started_again_until_its_restarts_are_used_up(tmp_path, monkeypatch):
    run = Run(tmp_path, monkeypatch, restarts=2)
    untouched = {name: run.pids[name] for name in ("generator.0", "reward.0", "learner.0", "learner.1", "controller")}
    for attempt in (1, 2):
        old = run.kill("generator.1")
        run.wait(lambda old=old: run.pids["generator.1"] != old)
        assert f"generator.1 was killed by SIGKILL; started again ({attempt} of 2)" in run.output.getvalue()
        run.wait(lambda attempt=attempt: run.log("generator.1") == "up\n" * (attempt + 1))
    last = run.kill("generator.1")
    run.wait(lambda: "generator.restarts = 2 are used up" in run.output.getvalue())
    assert run.pids == untouched | {"generator.1": last}
    assert run.thread.is_alive()  # the others continue; the controller says when that makes no sense any more
    assert run.end() == 0


@pytest.mark.parametrize("phase", ["start", "train"])
def test_processes_without_cores_are_placed_while_training(tmp_path, monkeypatch, phase):
    placed: list[list[str]] = []
    monkeypatch.setattr(
        FloatingProcesses, "place", lambda self, processes: placed.append([process.name for process in processes])
    )
    run = Run(tmp_path, monkeypatch, restarts=1, phase=phase)
    if phase == "train":
        run.wait(lambda: placed)
    assert run.end() == 0
    everyone = ["learner.0", "learner.1", "generator.0", "generator.1", "reward.0", "controller"]
    assert all(sorted(names[:-1]) == sorted(everyone[:-1]) and names[-1] == "controller" for names in placed)
    assert bool(placed) == (phase == "train")


def test_a_run_ends_when_another_has_its_directory_and_leaves_that_ones_files_alone(tmp_path, monkeypatch):
    others: list[str] = []
    run = Run(tmp_path, monkeypatch, restarts=2, taken=lambda: others[0] if others else None)
    (tmp_path / "summary.json").write_text("theirs")
    pids = run.pids
    others.append("run.dir = x: process 7 on m7 runs there")
    assert run.join() == 1
    assert "run.dir = x: process 7 on m7 runs there" in run.output.getvalue()
    assert (tmp_path / "summary.json").read_text() == "theirs"
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids.values())


def test_a_reward_models_server_is_started_again_too(tmp_path, monkeypatch):
    run = Run(tmp_path, monkeypatch, restarts=1)
    old = run.pids["reward.0"]
    os.kill(old, signal.SIGSTOP)
    run.report_silent("reward.0", since=time.monotonic())
    run.wait(lambda: run.pids["reward.0"] != old)
    assert "reward.0: has answered no request; killed" in run.output.getvalue()
    assert "reward.0 was killed by SIGKILL; started again (1 of 1)" in run.output.getvalue()
    run.wait(lambda: run.log("reward.0") == "up\n" * 2)
    run.kill("reward.0")
    run.wait(lambda: "reward.restarts = 1 are used up" in run.output.getvalue())
    assert run.end() == 0


def test_a_generator_that_must_not_be_started_again_ends_the_run(tmp_path, monkeypatch):
    run = Run(tmp_path, monkeypatch, restarts=0)
    run.kill("generator.1")
    assert run.join() == 1
    assert "error: generator.1 was killed by SIGKILL" in run.output.getvalue()


def leave_checkpoint(directory: Path, version: int) -> Path:
    checkpoint = RunCheckpoints(directory).path(version)
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").write_bytes(b"weights")
    write_digests(checkpoint)
    return checkpoint


@pytest.mark.parametrize("silent", [False, True], ids=["killed", "hangs"])
def test_a_learner_goes_back_to_the_last_whole_checkpoint(tmp_path, monkeypatch, silent: bool):
    leave_checkpoint(tmp_path, 20)
    broken = leave_checkpoint(tmp_path, 40)
    (broken / "weights").write_bytes(b"weighty")
    cut: list[int] = []
    run = Run(tmp_path, monkeypatch, restarts=0, cut_back=cut.append)
    for attempt in (1, 2, 3):
        before = run.pids
        if silent:
            os.kill(before["learner.1"], signal.SIGSTOP)
            run.report_silent("learner", since=time.monotonic())
            (tmp_path / "fail").touch()
            run.wait(lambda: "continuing" in run.output.getvalue())
            (tmp_path / "fail").unlink()
        else:
            run.kill("learner.1")
        ours = ("learner.0", "learner.1", "controller")
        run.wait(lambda before=before: all(run.pids[name] != before[name] for name in ours))
        run.wait(lambda attempt=attempt: run.log("learner.1").count("up") == attempt + 1)
        assert {name: run.pids[name] for name in ("generator.0", "generator.1", "reward.0")}.items() <= before.items()
        assert not any(lives(before[name]) for name in ours)
        assert cut == [20] * attempt
        told = f"continuing from step 20 (run.max_restarts: {attempt} of 3)"
        run.wait(lambda told=told: told in run.output.getvalue())
        arguments = Path(f"/proc/{run.pids['controller']}/cmdline").read_bytes().split(b"\0")
        assert (
            arguments[-4:] == [b"--resume-from", b"20", b"--servers-stayed", b""]
            and arguments.count(b"--resume-from") == 1
        )
        if silent:
            assert run.end() == 0
            return
    run.kill("learner.0")
    assert run.join() == 1
    assert "error: learner.0 was killed by SIGKILL" in run.output.getvalue()


def test_a_checkpoint_that_is_put_in_place_meanwhile_is_the_one_it_goes_back_to(tmp_path, monkeypatch):
    leave_checkpoint(tmp_path, 20)
    newer = leave_checkpoint(tmp_path, 40)
    newer.rename(tmp_path / "late")
    program = (
        "import os, signal, sys\n"
        "def put(*_): os.rename(sys.argv[1] + '/late', sys.argv[3]); sys.exit(1)\n"
        "signal.signal(signal.SIGTERM, put)\n"
    )
    cut: list[int] = []
    run = Run(
        tmp_path, monkeypatch, restarts=0, controller=(program + CONTROLLER, "train", str(newer)), cut_back=cut.append
    )
    run.kill("learner.1")
    run.wait(lambda: "continuing from step 40" in run.output.getvalue())
    run.wait(lambda: run.log("learner.1").count("up") == 2)
    assert cut == [40]
    assert run.end() == 0


def test_how_ranks_end_that_nothing_is_needed_of_changes_nothing(tmp_path, monkeypatch):
    leave_checkpoint(tmp_path, 20)
    run = Run(tmp_path, monkeypatch, restarts=0, cut_back=lambda version: pytest.fail(f"cut back to {version}"))
    run.tell({"event": "phase", "name": LAST_PHASE})
    run.wait(lambda: f"{LAST_PHASE}\n" in run.output.getvalue())
    pid = run.kill("learner.1")
    run.wait(lambda: not lives(pid))
    time.sleep(2 * _SETTLE_S)  # in which the controller uploads what there is
    assert run.end() == 0
    assert "learner.1" not in run.output.getvalue()


def test_without_a_checkpoint_the_death_of_a_learner_ends_the_run(tmp_path, monkeypatch):
    broken = leave_checkpoint(tmp_path, 40)
    (broken / "weights").unlink()
    run = Run(tmp_path, monkeypatch, restarts=0, cut_back=lambda version: pytest.fail(f"cut back to {version}"))
    run.kill("learner.1")
    assert run.join() == 1
    assert "error: learner.1 was killed by SIGKILL" in run.output.getvalue()


def test_servers_that_the_controller_asks_for_take_the_place_of_those_before(tmp_path, monkeypatch):
    run = Run(tmp_path, monkeypatch, restarts=0, phase="start", on_request=("policy", "against"))
    untouched = run.pids
    run.request("policy")
    run.wait(lambda: run.log("policy.0") == run.log("policy.1") == "up\n")
    run.wait(lambda: {"policy.0", "policy.1"} <= run.pids.keys())
    before = {name: run.pids[name] for name in ("policy.0", "policy.1")}
    run.request("against")
    run.wait(lambda: run.log("against.0") == run.log("against.1") == "up\n")
    assert not any(map(lives, before.values()))
    run.wait(lambda: "against.1" in run.pids)
    after = {name: run.pids[name] for name in ("against.0", "against.1")}
    assert run.pids == untouched | after
    run.kill("against.1")
    assert run.join() == 1
    assert "error: against.1 was killed by SIGKILL" in run.output.getvalue()
    assert "with --resume keeps the answers" in run.output.getvalue()
    assert not any(map(lives, after.values()))


def test_a_death_before_training_ends_the_run(tmp_path, monkeypatch):
    """A server that cannot start would not the second time either."""
    run = Run(tmp_path, monkeypatch, restarts=3, phase="start")
    run.kill("generator.0")
    assert run.join() == 1
    assert "error: generator.0 was killed by SIGKILL" in run.output.getvalue()


def test_the_death_of_any_other_process_ends_the_run(tmp_path, monkeypatch):
    run = Run(tmp_path, monkeypatch, restarts=3)
    run.kill("learner.0")
    assert run.join() == 1
    assert "error: learner.0 was killed by SIGKILL" in run.output.getvalue()


def test_a_generator_that_does_nothing_is_killed_and_started_again(tmp_path, monkeypatch):
    run = Run(tmp_path, monkeypatch, restarts=2)
    old = run.pids["generator.1"]
    os.kill(old, signal.SIGSTOP)
    run.report_silent("generator.1", since=time.monotonic())
    run.wait(lambda: run.pids["generator.1"] != old)
    assert "generator.1: has answered no request; killed" in run.output.getvalue()
    assert "generator.1 was killed by SIGKILL; started again (1 of 2)" in run.output.getvalue()
    run.wait(lambda: run.log("generator.1") == "up\n" * 2)
    new = run.pids["generator.1"]
    run.report_silent("generator.1", since=time.monotonic() - 3600)  # of the one before: it comes late
    time.sleep(0.5)
    assert run.pids["generator.1"] == new and run.thread.is_alive()
    assert run.end() == 0


def test_a_generator_that_does_nothing_and_must_not_be_started_again_ends_the_run(tmp_path, monkeypatch):
    run = Run(tmp_path, monkeypatch, restarts=0)
    run.report_silent("generator.1", since=time.monotonic())
    assert run.join() == 1
    assert "error: generator.1: has answered no request" in run.output.getvalue()
    assert json.loads((tmp_path / "summary.json").read_text())["error"] == "generator.1: has answered no request"


def test_a_stopped_learner_rank_is_told_from_those_that_wait_for_it(tmp_path, monkeypatch):
    run = Run(tmp_path, monkeypatch, restarts=0)
    os.kill(run.pids["learner.1"], signal.SIGSTOP)
    run.report_silent("learner", since=time.monotonic())
    (tmp_path / "fail").touch()
    assert run.join() == 1
    assert "error: learner.1 did nothing any more, not even react to a signal" in run.output.getvalue()
    assert "File" in run.log("learner.0"), "where it waits is in its log"


def test_a_rank_that_gave_up_waiting_is_not_taken_for_the_cause(tmp_path, monkeypatch):
    """Its collective timed out, and it ended; the other one is stopped."""
    run = Run(tmp_path, monkeypatch, restarts=0)
    os.kill(run.pids["learner.1"], signal.SIGSTOP)
    os.kill(run.pids["learner.0"], signal.SIGTERM)  # stands for an end of its own
    assert run.join() == 1
    assert "error: learner.1 did nothing any more" in run.output.getvalue()


def test_a_learner_whose_ranks_all_wait_says_so_itself(tmp_path, monkeypatch):
    run = Run(tmp_path, monkeypatch, restarts=0)
    run.report_silent("learner", since=time.monotonic())
    (tmp_path / "fail").touch()
    assert run.join() == 1
    assert "error: the learner did not answer" in run.output.getvalue()
    assert "File" in run.log("learner.0") and "File" in run.log("learner.1")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB of its own."""
    directory = tmp_path / "small"
    directory.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", directory], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    yield directory
    subprocess.run(["umount", directory], check=True)


def test_the_summary_of_a_run_that_filled_the_disk_is_true(small_disk, tmp_path, monkeypatch):
    run = Run(small_disk, monkeypatch, restarts=3, controller=(FILLING_CONTROLLER, str(tmp_path / "go")))
    assert (small_disk / RESERVE).stat().st_size == 64 * 2**10
    (tmp_path / "go").touch()
    assert run.join() == 1
    assert json.loads((small_disk / "summary.json").read_text()) == {
        "steps": 3,
        "status": "failed",
        "error": "metrics.jsonl cannot be written",
    }
    *_, error, ending = run.output.getvalue().splitlines()
    assert error.endswith("error: metrics.jsonl cannot be written") and "failed: " in ending
    assert "  | " not in run.output.getvalue()  # there is nothing in a log that would say more
    assert not (small_disk / RESERVE).exists()


def test_a_supervisor_that_finds_the_disk_full_says_so_in_one_line(small_disk, monkeypatch):
    """A generator is to be started again, and the file with the ids of processes cannot be written."""
    run = Run(small_disk, monkeypatch, restarts=3)
    with (small_disk / "filling").open("wb", buffering=0) as file, pytest.raises(OSError):
        while file.write(bytes(1000)):
            pass
    run.kill("generator.1")
    assert run.join() == 1
    error = f"{small_disk / PROCESSES} cannot be written (No space left on device); make room there, then continue with --resume"
    summary = json.loads((small_disk / "summary.json").read_text())
    assert (summary["status"], summary["error"]) == ("failed", error)
    assert f"error: {error}" in run.output.getvalue() and "Traceback" not in run.output.getvalue()


def test_a_disk_that_is_full_from_the_start_is_named(small_disk, monkeypatch):
    with (small_disk / "filling").open("wb", buffering=0) as file, pytest.raises(OSError):
        while file.write(bytes(1000)):
            pass
    output = io.StringIO()
    plan = ProcessPlan(learners=[], generators=[], controller=process("controller", CONTROLLER))
    config = RunConfig.model_validate({"model": MODEL})
    monkeypatch.setattr(signal, "signal", lambda number, handler: handler)
    code = Supervisor(config, plan, small_disk, Display(Console(file=output, width=300)), Fleet(list)).run()
    assert code == 1
    assert f"{small_disk / RESERVE} cannot be written (No space left on device)" in output.getvalue()


def test_an_output_that_takes_no_more_ends_no_run(tmp_path):
    """As `async-rlhf train ... > run.log` beside a run that fills the disk."""
    code = """
import pathlib, sys
from megatron_async_rlhf.launch.display import Display
display = Display()
display.note("step 1")
display.finished("failed", "no room", ["last words"], pathlib.Path("run"))
print("continued", file=sys.stderr)
"""
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, timeout=LIMIT_S
        )
    assert "continued" in ended.stderr
