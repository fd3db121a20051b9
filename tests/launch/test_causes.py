"""The first cause in a log, on what vLLM 0.32 wrote when it failed, and on lines that others write."""

import io
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.launch.causes import first_cause, signal_hint
from megatron_async_rlhf.launch.display import Display
from megatron_async_rlhf.launch.fleet import Fleet
from megatron_async_rlhf.launch.plan import ProcessPlan, ProcessSpec
from megatron_async_rlhf.launch.process import LocalProcess
from megatron_async_rlhf.launch.supervisor import Supervisor

SERVERS = Path(__file__).with_name("failed_servers")
MODEL = {"layers": 2, "hidden_size": 64, "ffn_size": 96, "heads": 2, "context_length": 96}
STAND = "import time; time.sleep(600)"
INFO = "(APIServer pid=7) INFO 11-26 23:29:01 [loggers.py:1] Engine 000: Running: 3 reqs"
WRAPPED = """Traceback (most recent call last):
  File "/venv/lib/vllm/v1/engine/utils.py", line 1431, in wait_for_engine_startup
    raise RuntimeError(
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': 1}"""


@pytest.mark.parametrize(
    ("server", "cause", "below"),
    [
        ("head_size", "RuntimeError: Unsupported CPU attention configuration: head_dim=24", 100),
        (
            "kv_cache",
            "ValueError: To serve at least one request with the model's max seq len (4000000), (1.91 GiB KV",
            50,
        ),
        (
            "missing_file",
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig Value err",
            0,
        ),
        ("port_taken", "OSError: [Errno 98] Address already in use", 0),
        ("worker_extension", "ModuleNotFoundError: No module named 'nowhere'", 100),
    ],
)
def test_what_vllm_failed_of(server: str, cause: str, below: int):
    """Often it stands `below` lines further up, behind what every other process says of it."""
    lines = (SERVERS / f"{server}.log").read_text(encoding="utf-8").splitlines()
    found = first_cause(lines)
    assert found.line.startswith(cause)
    assert len(found.lines) <= 15 and any(cause[:50] in line for line in found.lines)
    if below:
        assert not any(cause in line for line in lines[-below:])


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        ("", None),
        (INFO, None),
        (f"{INFO}\nUserWarning: Apex is not installed. Falling back to Torch Norm", None),
        ("usage: api_server.py [options]\napi_server.py: error: unrecognized arguments: --x", "unrecognized arguments: --x"),
        ("\x1b[31mterminate called after throwing an instance of 'std::bad_alloc'\x1b[0m\n  what():  std::bad_alloc", "terminate called"),
        (f"Fatal Python error: Bus error\n\nThread 0x7f (most recent call first):\n  File x\n{WRAPPED}", "Fatal Python error: Bus error"),
        (
            "n1:12:34 [0] NCCL WARN Call to connect to 10.0.0.1 failed : Connection refused\n"
            'Traceback (most recent call last):\n  File "x.py", line 1, in x\n'
            "torch.distributed.DistBackendError: NCCL error in: x.cpp:77, remote process exited",
            "NCCL WARN Call to connect to 10.0.0.1 failed",
        ),
        (
            "2026-11-26 23:00:00,123 ERROR run failed: disk full\nTraceback (most recent call last):\n"
            '  File "a.py", line 1, in a\nKeyError: 1\n\nDuring handling of the above exception, another exception occurred:\n\n'
            'Traceback (most recent call last):\n  File "b.py", line 1, in b\nRuntimeError: second',
            "KeyError: 1",
        ),
        (f"(EngineCore pid=9) ERROR 11-26 23:00:00 [utils.py:9] Engine core proc EngineCore died unexpectedly, bye\n{WRAPPED}",
         "Engine core proc EngineCore died unexpectedly"),
        # A request that was refused an hour ago is another matter.
        ("\n".join(["ValueError: old", 'Traceback (most recent call last):\n  File "a", line 1\nValueError: old', *[INFO] * 40, WRAPPED.replace("Engine core initialization failed. See root cause above.", "out of blocks")]),
         "RuntimeError: out of blocks"),
        (WRAPPED, "RuntimeError: Engine core initialization failed"),
    ],
)  # fmt: skip
def test_what_others_write(log: str, cause: str | None):
    found = first_cause(log.splitlines())
    assert found is None if cause is None else cause in found.line


@pytest.mark.parametrize(
    ("code", "hint"), [(-9, "out of memory"), (137, "out of memory"), (-7, "/dev/shm"), (1, ""), (0, "")]
)
def test_what_a_signal_often_means(code: int, hint: str):
    assert hint in signal_hint(code) and bool(hint) == bool(signal_hint(code))


def process(name: str, program: str, *arguments: str) -> ProcessSpec:
    return ProcessSpec(name=name, arguments=[sys.executable, "-c", program, *arguments], environment={}, cores=[])


def supervised(directory: Path, **programs: str) -> tuple[int, str]:
    """Exit code and output of a run of such processes."""
    plan = ProcessPlan(
        learners=[process("learner.0", programs.get("learner", STAND))],
        generators=[process("generator.0", programs.get("generator", STAND))],
        controller=process("controller", programs.get("controller", STAND)),
    )
    config, output = RunConfig.model_validate({"model": MODEL, "launch": {"shutdown_grace_s": 1.0}}), io.StringIO()
    supervisor = Supervisor(config, plan, directory, Display(Console(file=output, width=2000)), Fleet(list))
    return supervisor.run(), output.getvalue()


def test_the_cause_is_in_the_error_and_above_it(tmp_path: Path):
    log = SERVERS / "worker_extension.log"
    code, said = supervised(
        tmp_path, generator=f"print(open({str(log)!r}, encoding='utf-8').read()); raise SystemExit(1)"
    )
    assert code == 1
    assert (
        f"error: generator.0 ended with exit code 1; see {tmp_path}/logs/generator.0.log; its log says: ModuleNotF"
        in said
    )
    assert "  | (VllmWorker-0 pid=13601) ERROR" in said and "Engine core initialization failed" not in said


def test_a_process_that_was_killed_says_what_often_does_it(tmp_path: Path):
    """Megatron's warnings, the last lines of its log, have nothing to do with it."""
    program = "import os; print('UserWarning: Apex is not installed\\n' * 24, flush=True); os.kill(os.getpid(), 9)"
    (tmp_path / "checkpoints/step_000003").mkdir(parents=True)
    code, said = supervised(tmp_path, learner=program)
    assert code == 1 and "Apex" not in said
    assert "error: learner.0 was killed by SIGKILL, which often means out of memory" in said
    assert "the same command with --resume continues from its last checkpoint" in said


def test_the_log_of_an_earlier_start_is_not_looked_at(tmp_path: Path):
    (tmp_path / "x.log").write_text("ValueError: the other time\n" + WRAPPED + "\n", encoding="utf-8")
    ended = LocalProcess(process("x", "print('fine')"), tmp_path)
    wait(lambda: ended.returncode is not None)
    assert ended.cause() is None and ended.last_lines() == ["fine"]


def wait(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# Supervises a controller that says when it was asked to end, and needs a moment for that.
UNDER_A_TERMINAL = """
import faulthandler
import sys
faulthandler.dump_traceback_later(25, file=open(sys.argv[1] + "/stacks", "w"))
sys.path.insert(0, sys.argv[2])
from pathlib import Path
import test_causes
from megatron_async_rlhf.launch.terminal import outlive_readers
outlive_readers()
controller = '''
import json, pathlib, signal, sys, time
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
print(json.dumps({"event": "phase", "name": "train"}), flush=True)
pathlib.Path(sys.argv[1], "ready").touch()
while not asked: time.sleep(0.02)
time.sleep(1)
pathlib.Path(sys.argv[1], "saved").write_text(str(len(asked)))
raise SystemExit(130)
'''
directory = Path(sys.argv[1])
plan = test_causes.ProcessPlan(
    learners=[], generators=[], controller=test_causes.process("controller", controller, str(directory))
)
config = test_causes.RunConfig.model_validate({"model": test_causes.MODEL})
code = test_causes.Supervisor(config, plan, directory, test_causes.Display(), test_causes.Fleet(list)).run()
(directory / "code").write_text(str(code))
raise SystemExit(code)
"""


@pytest.fixture
def terminal(tmp_path: Path):
    """Starts a supervisor in a session of its own, whose terminal is a pseudo one; returns it and the other end."""
    started: list[subprocess.Popen] = []

    def start(**keys) -> tuple[subprocess.Popen, int]:
        ours, theirs = pty.openpty()

        def prepare() -> None:
            os.setsid()
            os.close(os.open(os.ttyname(theirs), os.O_RDWR))  # makes it the controlling terminal
            signal.signal(
                signal.SIGHUP, signal.SIG_IGN if keys.get("nohup") else signal.SIG_DFL
            )  # however we were started

        command = [sys.executable, "-c", UNDER_A_TERMINAL, str(tmp_path), str(Path(__file__).parent)]
        started.append(subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=prepare))
        os.close(theirs)
        wait(lambda: (tmp_path / "ready").exists())
        return started[-1], ours

    yield start
    for supervisor in started:
        supervisor.kill()
        supervisor.wait()


def test_a_terminal_that_closes_interrupts_a_run_once(tmp_path: Path, terminal):
    """As with SIGTERM the step under way ends; the second SIGHUP, which the shell sends, does not cut that short."""
    supervisor, ours = terminal()
    os.close(ours)  # the kernel hangs up, and what is printed from now on goes nowhere
    time.sleep(0.2)
    supervisor.send_signal(signal.SIGHUP)
    wait(lambda: supervisor.poll() is not None or (tmp_path / "stacks").stat().st_size)
    assert supervisor.poll() == 130, (tmp_path / "stacks").read_text()
    assert (tmp_path / "saved").read_text() == "1"
    assert '"status": "interrupted"' in (tmp_path / "summary.json").read_text()


def test_under_nohup_a_run_goes_on_when_its_terminal_closes(tmp_path: Path, terminal):
    supervisor, ours = terminal(nohup=True)
    os.close(ours)
    time.sleep(0.5)
    assert supervisor.poll() is None and not (tmp_path / "saved").exists()
    supervisor.send_signal(signal.SIGTERM)
    assert supervisor.wait(timeout=30) == 130 and (tmp_path / "saved").read_text() == "1"
