"""Who may run in a run directory: starts on this machine and, by hand, what those on others leave and do."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from megatron_async_rlhf.cli import app
from megatron_async_rlhf.config.load import load_config
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.launch import owner
from megatron_async_rlhf.launch.owner import Owner, owner_path, owning
from megatron_async_rlhf.launch.run_directory import create_run_directory

TINY = Path(__file__).parents[1] / "e2e/tiny.yaml"
LIMIT_S = 60
ELSEWHERE = Owner(host="m7", machine="another boot", pid=os.getpid(), started=0)
# Takes the directory, says so, and stays.
RUN = """
import sys, time
from pathlib import Path
from megatron_async_rlhf.config.load import load_config
from megatron_async_rlhf.launch.owner import owning
with owning(load_config(Path(sys.argv[1]), [sys.argv[2]])):
    print("mine", flush=True)
    time.sleep(600)
"""
# Many at once; each that gets it keeps it until all have tried.
CROWD = """
import multiprocessing, sys
from pathlib import Path
from megatron_async_rlhf.config.load import load_config
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.launch.owner import owning

def run(all_have_tried, config):
    try:
        with owning(config):
            print("mine", flush=True)
            all_have_tried.wait(30)
    except ConfigError:
        all_have_tried.wait(30)

fork = multiprocessing.get_context("fork")
config, barrier = load_config(Path(sys.argv[1]), [sys.argv[2]]), fork.Barrier(12)
children = [fork.Process(target=run, args=(barrier, config)) for _ in range(12)]
for child in children: child.start()
for child in children: child.join()
"""


@pytest.fixture
def config(tmp_path: Path):
    return load_config(TINY, [f"run.dir={tmp_path / 'run'}"])


def program(text: str, config) -> list[str]:
    return [sys.executable, "-c", text, str(TINY), f"run.dir={config.run.path}"]


@contextlib.contextmanager
def killed_run(config):
    """One that took the directory and was killed; its parent has not asked about it yet."""
    with subprocess.Popen(program(RUN, config), stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout.readline() == "mine\n"
        with pytest.raises(ConfigError, match=f": process {run.pid} on .* runs there"), owning(config):
            pass
        run.kill()
        os.waitid(os.P_PID, run.pid, os.WEXITED | os.WNOWAIT)
        yield


def test_a_run_that_is_alive_is_left_alone_and_a_dead_one_taken_over(config):
    with killed_run(config):
        with owning(config):
            assert owner_path(config).is_file()
    assert list(config.run.path.parent.iterdir()) == []


def test_of_many_starts_one_takes_over_what_a_dead_run_has_left(config):
    with killed_run(config):
        done = subprocess.run(program(CROWD, config), capture_output=True, text=True, timeout=LIMIT_S)
    assert (done.returncode, done.stdout) == (0, "mine\n"), done.stderr
    assert list(config.run.path.parent.iterdir()) == []


def test_a_process_that_got_the_id_of_a_dead_run_is_not_taken_for_it(config):
    with owning(config):
        written = owner._read(owner_path(config))
    owner_path(config).write_bytes(msgspec.json.encode(msgspec.structs.replace(written, started=written.started - 1)))
    with owning(config):
        pass


@pytest.mark.parametrize("content", [msgspec.json.encode(ELSEWHERE), b""], ids=["whole", "just made"])
def test_one_elsewhere_is_alive_while_its_file_is_touched(config, content: bytes, monkeypatch):
    monkeypatch.setattr(owner, "_TOUCH_S", 0.02)
    path, over = owner_path(config), threading.Event()
    path.write_bytes(content)
    thread = threading.Thread(target=owner._keep_touching, args=(path, ELSEWHERE, over, owner.Taken(config)))
    thread.start()
    with pytest.raises(ConfigError) as refused, owning(config):
        pass
    over.set()
    thread.join()
    who = f"process {os.getpid()} on m7" if content else "another process"
    assert str(refused.value) == (
        f"run.dir = {config.run.path}: {who} runs there; choose another run.name or run.dir, or end that run: "
        f"touch {config.run.path / 'stop'}"
    )
    assert path.read_bytes() == content
    short = load_config(TINY, [f"run.dir={config.run.path}", "launch.node_timeout_s=3"])
    with owning(short):
        assert path.read_bytes() != content


@pytest.mark.parametrize(("command", "flags"), [("train", []), ("train", ["--resume"]), ("sft", [])])
def test_a_second_start_changes_nothing(config, command: str, flags: list[str]):
    run = config.run.path
    (run / "checkpoints/step_000004.partial").mkdir(parents=True)
    (run / "config.yaml").touch()
    with owning(config):
        before = sorted(run.parent.rglob("*"))
        told = CliRunner().invoke(app, [command, str(TINY), "-s", f"run.dir={run}", *flags])
        assert isinstance(told.exception, ConfigError), told.output
        assert f"process {os.getpid()} on " in str(told.exception)
        assert sorted(run.parent.rglob("*")) == before


def test_where_nothing_can_be_written_beside_it_the_file_is_in_the_directory(config, monkeypatch):
    """As in a mounted volume; the parent is somebody else's."""
    config.run.path.mkdir()
    monkeypatch.setattr(owner.os, "access", lambda path, mode: Path(path) != config.run.path.parent)
    with owning(config):
        assert owner_path(config).parent == config.run.path
        with pytest.raises(ConfigError, match="runs there"), owning(config):
            pass
        assert create_run_directory(config, TINY.parent)[1] is None  # it does not count as a run
        assert (config.run.path / "config.yaml").is_file()
    assert not owner_path(config).exists()


def test_a_directory_is_the_same_under_each_of_its_names(config, tmp_path):
    """When its run is set aside, too: a link continues to lead to what is new."""
    target = tmp_path / "target"
    target.mkdir()
    (target / "config.yaml").touch()
    config.run.path.symlink_to(target)
    before = owner_path(config)
    run_dir, aside = create_run_directory(config, TINY.parent)
    assert (run_dir, aside) == (target, tmp_path / "target.1")
    assert config.run.path.is_symlink() and owner_path(config) == before


def test_a_file_that_was_deleted_comes_back_and_another_run_that_was_faster_is_noticed(config, monkeypatch):
    monkeypatch.setattr(owner, "_TOUCH_S", 0.02)
    path = owner_path(config)
    with owning(config) as taken:
        written = path.read_bytes()
        path.unlink()
        wait_until(lambda: path.is_file() and path.read_bytes() == written)
        with pytest.raises(ConfigError, match=f": process {os.getpid()} on .* runs there"), owning(config):
            pass
        assert taken() is None
        path.write_bytes(msgspec.json.encode(ELSEWHERE))
        wait_until(lambda: taken() is not None)
        assert f"process {os.getpid()} on m7 runs there" in taken()
        assert f"{path}, was deleted" in taken()
    assert path.read_bytes() == msgspec.json.encode(ELSEWHERE)  # it is not ours to delete


def wait_until(holds) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)
