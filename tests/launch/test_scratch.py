"""What a process of a run leaves in the temporary directory and in shared memory goes when it does, however that is."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from megatron_async_rlhf.launch import scratch
from megatron_async_rlhf.launch.plan import ProcessSpec
from megatron_async_rlhf.launch.process import LocalProcess, _group
from megatron_async_rlhf.launch.scratch import Scratch, remove_abandoned

LIMIT_S = 30
# As vLLM does: a process and a child of it, each with shared memory and a socket; how it ends is up to a signal.
OWNER = """
import multiprocessing, signal, socket, sys, tempfile, time
from multiprocessing.shared_memory import SharedMemory

def own(queue):
    memory, server = SharedMemory(create=True, size=64), socket.socket(socket.AF_UNIX)
    path = tempfile.mktemp()
    server.bind(path)
    queue.put(["/dev/shm/" + memory.name, path])
    time.sleep(600)

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    context.Process(target=own, args=(queue,), daemon=True).start()
    import threading
    threading.Thread(target=own, args=(queue,), daemon=True).start()
    import json
    print(json.dumps(queue.get() + queue.get()), flush=True)
    time.sleep(600)
"""


@pytest.fixture
def start(tmp_path: Path):
    processes = []

    def start() -> tuple[LocalProcess, list[Path]]:
        """Also the files that are there because of it."""
        script = tmp_path / "owner.py"
        script.write_text(OWNER)
        spec = ProcessSpec(name="owner", arguments=[sys.executable, str(script)], environment={}, cores=[])
        process = LocalProcess(spec, tmp_path, pipe_stdout=True)
        processes.append(process)
        return process, [Path(path) for path in json.loads(process.stdout.readline())]

    yield start
    for process in processes:
        process.kill_group(signal.SIGKILL)
        process.clean_up()


@pytest.mark.parametrize("before", ["asked", "stopped", "killed"])
def test_nothing_is_left_of_a_process_and_its_children(start, before: str):
    process, files = start()
    assert len(files) == 4 and all(path.exists() for path in files)
    if before == "stopped":  # all of it but Python's tracker, which nobody stops alone
        for pid in _group(process.pid):
            if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGSTOP)
    if before == "asked":
        process.kill_group(signal.SIGTERM)
        deadline = time.monotonic() + LIMIT_S
        while process.returncode is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    process.kill_group(signal.SIGKILL)
    process.clean_up()
    assert not [path for path in files if path.exists()]
    assert not files[1].parent.exists()


@pytest.mark.parametrize("name", ["vllm_dist_0123-tp:0-[0-1]-cpushm_0", "45123-tp:0-[0-1]-cpushm_1"])
def test_shared_memory_that_nobody_tracks_goes_too(tmp_path: Path, name: str):
    """As vLLM's tensor parallelism on a CPU makes it, called after a rendezvous file or a port."""
    path = Path("/dev/shm") / name.replace("123", f"{os.getpid()}")
    code = "import mmap, sys, time; f = open(sys.argv[1], 'w+b'); f.truncate(64); m = mmap.mmap(f.fileno(), 64); print(1, flush=True); time.sleep(600)"
    spec = ProcessSpec(name="worker", arguments=[sys.executable, "-c", code, str(path)], environment={}, cores=[])
    process = LocalProcess(spec, tmp_path, pipe_stdout=True)
    process.stdout.readline()
    assert path.exists()
    process.kill_group(signal.SIGKILL)
    process.clean_up()
    assert not path.exists()


def test_shared_memory_of_workers_that_died_by_themselves_is_known_by_its_name(tmp_path: Path):
    name = f"vllm_dist_{os.getpid()}"
    code = f"import os; open(os.environ['TMPDIR'] + '/{name}', 'w'); open('/dev/shm/{name}-tp:0-cpushm_0', 'w')"
    spec = ProcessSpec(name="worker", arguments=[sys.executable, "-c", code], environment={}, cores=[])
    process = LocalProcess(spec, tmp_path)
    deadline = time.monotonic() + LIMIT_S
    while process.returncode is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    path = Path(f"/dev/shm/{name}-tp:0-cpushm_0")
    assert process.returncode == 0 and path.exists()
    process.kill_group(signal.SIGKILL)
    process.clean_up()
    assert not path.exists()


def test_what_is_cleaned_up_ends_nobody_who_has_its_number_by_now(start):
    process, _ = start()
    other, files = start()
    process.kill_group(signal.SIGKILL)
    process.clean_up()
    process._popen.pid = other.pid
    process.kill_group(signal.SIGKILL)
    process.clean_up()
    assert other.returncode is None and all(path.exists() for path in files)


def test_others_keep_theirs(start):
    process, _ = start()
    _, files = start()
    process.kill_group(signal.SIGKILL)
    process.clean_up()
    assert all(path.exists() for path in files)


def test_who_starts_next_removes_what_a_killed_supervisor_left():
    code = "from megatron_async_rlhf.launch.scratch import Scratch; print(Scratch().path, flush=True); input()"
    maker = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    left, own = Path(maker.stdout.readline().strip()), Scratch()
    remove_abandoned()
    assert left.is_dir() and own.path.is_dir()  # both are in use
    maker.kill()
    maker.wait()
    remove_abandoned()
    assert not left.exists() and own.path.is_dir()
    own.remove()


def test_what_another_user_has_made_is_left_alone(monkeypatch):
    """Its names are patterns, and say what is removed from /dev/shm."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    planted = Path(f"/tmp/rlhf-{scratch._machine()}-{gone.pid}-1-planted")
    planted.mkdir()
    monkeypatch.setattr(scratch.os, "getuid", lambda: os.lstat(planted).st_uid + 1)
    remove_abandoned()
    was_kept = planted.exists()
    monkeypatch.undo()
    remove_abandoned()
    assert (was_kept, planted.exists()) == (True, False)


def test_a_socket_fits_whatever_the_temporary_directory_is_called(tmp_path: Path, monkeypatch):
    long = tmp_path / ("deep" * 20)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    scratch = Scratch()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(scratch.path / ("x" * 36)))
    assert not list(long.iterdir())
    scratch.remove()


def test_compiled_code_is_kept(monkeypatch):
    """Compiling again with every start would take minutes on a GPU."""
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    scratch = Scratch()
    program = "from torch._inductor.runtime.cache_dir_utils import default_cache_dir; print(default_cache_dir())"
    usual = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=LIMIT_S)
    assert scratch.environment["TORCHINDUCTOR_CACHE_DIR"] == usual.stdout.strip()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/own")
    assert Scratch().environment["TORCHINDUCTOR_CACHE_DIR"] == "/own"
    remove_own()


def remove_own() -> None:
    for path in Path(tempfile.gettempdir()).glob(f"rlhf-*-{os.getpid()}-*"):
        path.rmdir()


# A process and a child of it, both with a handler for what they would end on.
ENDS_ON_SIGNALS = """
import os, signal, sys, time
child = os.fork()
signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
signal.signal(signal.SIGINT, lambda *_: sys.exit(6))
if child:
    print("ready", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize(("blocks", "code"), [(True, 6), (False, 5)])
def test_a_generator_and_what_it_starts_get_no_sigterm(tmp_path: Path, blocks: bool, code: int):
    """Whoever ends a whole job sends it to every process, while the step under way still needs the generators."""
    arguments = [sys.executable, "-c", ENDS_ON_SIGNALS]
    spec = ProcessSpec(name="server", arguments=arguments, environment={}, cores=[], blocks_terminate=blocks)
    process = LocalProcess(spec, tmp_path, pipe_stdout=True)
    try:
        process.stdout.readline()
        process.kill_group(signal.SIGTERM)
        if blocks:
            time.sleep(0.3)
            assert len(list(_group(process.pid))) == 2
            process.kill_group(signal.SIGINT)
        deadline = time.monotonic() + LIMIT_S
        while process.returncode is None or list(_group(process.pid)):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert process.returncode == code
    finally:
        process.kill_group(signal.SIGKILL)
        process.clean_up()
