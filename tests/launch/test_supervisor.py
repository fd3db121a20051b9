"""The supervisor over real processes that only stand there: what becomes of the run when one of them dies."""

import io
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from rich.console import Console

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.launch.display import Display
from megatron_async_rlhf.launch.fleet import Fleet
from megatron_async_rlhf.launch.plan import ProcessPlan, ProcessSpec
from megatron_async_rlhf.launch.supervisor import Supervisor
from megatron_async_rlhf.telemetry.files import PROCESSES

MODEL = {"layers": 2, "hidden_size": 64, "ffn_size": 96, "heads": 2, "context_length": 96}
STAND = "import time; print('up', flush=True); time.sleep(600)"
LIMIT_S = 30
# Tells that training has begun, and ends well once the file `end` is there.
CONTROLLER = """
import json, pathlib, sys, time
print(json.dumps({"event": "stage", "name": sys.argv[2]}), flush=True)
while not pathlib.Path(sys.argv[1], "end").exists(): time.sleep(0.02)
"""


def process(name: str, *arguments: str) -> ProcessSpec:
    return ProcessSpec(name=name, arguments=[sys.executable, "-c", *arguments], environment={}, cores=[])


class Run:
    """A supervised run in a thread of its own, as `signal.signal` allows nowhere but in the first."""

    def __init__(self, directory: Path, monkeypatch, *, restarts: int, stage: str = "train") -> None:
        monkeypatch.setattr(signal, "signal", lambda number, handler: handler)
        self.directory, self.output = directory, io.StringIO()
        plan = ProcessPlan(
            learners=[process("learner.0", STAND)],
            generators=[process(f"generator.{i}", STAND) for i in range(2)],
            controller=process("controller", CONTROLLER, str(directory), stage),
            restarts=restarts,
        )
        config = RunConfig.model_validate({"model": MODEL, "launch": {"shutdown_grace_s": 1.0}})
        supervisor = Supervisor(config, plan, directory, Display(Console(file=self.output, width=200)), Fleet(list))
        self.thread = threading.Thread(target=lambda: setattr(self, "code", supervisor.run()))
        self.thread.start()
        self.wait(lambda: stage in self.output.getvalue())
        self.wait(lambda: "up" in self.log("generator.1"))

    def wait(self, condition) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            assert time.monotonic() < deadline, self.output.getvalue()
            time.sleep(0.02)

    @property
    def pids(self) -> dict[str, int]:
        return json.loads((self.directory / PROCESSES).read_text())

    def log(self, name: str) -> str:
        path = self.directory / f"logs/{name}.log"
        return path.read_text() if path.exists() else ""

    def kill(self, name: str) -> int:
        """Returns the process id it had."""
        pid = self.pids[name]
        os.kill(pid, signal.SIGKILL)
        return pid

    def end(self) -> int:
        (self.directory / "end").touch()
        return self.join()

    def join(self) -> int:
        self.thread.join(LIMIT_S)
        assert not self.thread.is_alive()
        return self.code


def test_a_generator_is_started_again_until_its_restarts_are_used_up(tmp_path, monkeypatch):
    run = Run(tmp_path, monkeypatch, restarts=2)
    untouched = {name: run.pids[name] for name in ("generator.0", "learner.0", "controller")}
    for attempt in (1, 2):
        old = run.kill("generator.1")
        run.wait(lambda old=old: run.pids["generator.1"] != old)
        assert f"generator.1 was killed by SIGKILL; started again ({attempt} of 2)" in run.output.getvalue()
        run.wait(lambda attempt=attempt: run.log("generator.1") == "up\n" * (attempt + 1))
    last = run.kill("generator.1")
    run.wait(lambda: "generator.restarts = 2 are used up" in run.output.getvalue())
    assert run.pids == untouched | {"generator.1": last}
    assert run.thread.is_alive()  # the others go on; the controller says when that makes no sense any more
    assert run.end() == 0


def test_a_generator_that_must_not_be_started_again_ends_the_run(tmp_path, monkeypatch):
    run = Run(tmp_path, monkeypatch, restarts=0)
    run.kill("generator.1")
    assert run.join() == 1
    assert "error: generator.1 was killed by SIGKILL" in run.output.getvalue()


def test_a_death_before_training_ends_the_run(tmp_path, monkeypatch):
    """A server that cannot start would not the second time either."""
    run = Run(tmp_path, monkeypatch, restarts=3, stage="start")
    run.kill("generator.0")
    assert run.join() == 1
    assert "error: generator.0 was killed by SIGKILL" in run.output.getvalue()


def test_the_death_of_any_other_process_ends_the_run(tmp_path, monkeypatch):
    run = Run(tmp_path, monkeypatch, restarts=3)
    run.kill("learner.0")
    assert run.join() == 1
    assert "error: learner.0 was killed by SIGKILL" in run.output.getvalue()
