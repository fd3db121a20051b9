"""A run over two machines (network namespaces) whose ports are tried from the other machine's address."""

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))
from harm.faults import WIRE, impossible_here  # noqa: E402
from harm.ledger import check  # noqa: E402
from harm.run import ChaosRun, Setting  # noqa: E402

MESSAGES = 10_000
PLANTED = ("WANDB_API_KEY", "HF_TOKEN")


def listeners(run: ChaosRun, machine: int) -> dict[int, str]:
    """Ports that are open to other machines, and the command line of who has each."""
    told = subprocess.run(
        ["ip", "netns", "exec", run.network.names[machine], "ss", "-ltnpH"], capture_output=True, text=True, check=True
    ).stdout
    found = {}
    for line in told.splitlines():
        address, _, port = line.split()[3].rpartition(":")
        pid = re.search(r"pid=(\d+)", line)
        if not address.startswith("127.") and pid:
            found[int(port)] = " ".join(psutil.Process(int(pid[1])).cmdline())
    return found


def protocol(run: ChaosRun, port: int, command: str) -> str:
    """https, zmq, or raw: what torch, gloo and vLLM's own workers speak among themselves."""
    if f"--port {port}" in command:
        return "https"
    if f"--listen tcp://10.77.0.1:{port}" in command or "megatron_async_rlhf train" in command:
        return "zmq"
    return "raw"


def try_from(run: ChaosRun, machine: int, port: int, kind: str, count: int, secret: str) -> dict[str, int]:
    """From the other machine."""
    address = ("10.77.0.1", "10.77.0.2")[machine]
    heard = [bytes(content) for (to, at, _), content in run.network.heard.items() if (to, at) == (address, port)]
    replayed = run.directory / f"replayed.{port}"
    replayed.write_text("\n".join(content.hex() for content in heard if content))
    program = [sys.executable, str(Path(__file__).with_name("stranger.py"))]
    command = [*program, address, str(port), kind, str(count), secret, str(replayed)]
    done = subprocess.run([*run.network.command(1 - machine), *command], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.timeout(1800)
def test_strangers_on_the_network(tmp_path, monkeypatch):
    if missing := sorted(WIRE & impossible_here().keys()) or shutil.which("ss") is None:
        pytest.skip(f"machines with a network of their own need {missing}")
    planted = {name: secrets.token_hex(20) for name in PLANTED}
    whole = ChaosRun(tmp_path / "whole", Setting("sync", steps=60), bound_s=300)
    whole.wait(lambda: whole.process.poll() == 0)
    undisturbed = check(whole, None)

    for name, value in planted.items():
        monkeypatch.setenv(name, value)
    run = ChaosRun(tmp_path / "tried", Setting("sync", machines=2, steps=60), bound_s=600)
    try:
        run.wait(lambda: run.steps() >= 2)
        tried: dict[str, list[dict[str, int]]] = {"https": [], "zmq": []}
        others = (whole.run / ".secret").read_text().strip()
        ports = [
            (machine, port, kind)
            for machine in range(2)
            for port, command in listeners(run, machine).items()
            if (kind := protocol(run, port, command)) != "raw"
        ]
        counts = {kind: MESSAGES // sum(each == kind for _, _, each in ports) for kind in tried}
        with ThreadPoolExecutor(len(ports)) as pool:
            told = pool.map(lambda place: try_from(run, *place, counts[place[2]], others), ports)
            for (_, _, kind), statuses in zip(ports, told, strict=True):
                tried[kind].append(statuses)
        assert run.process.poll() is None, "the run was over before it was tried"
        run.wait(lambda: run.process.poll() == 0)
        assert run.ends == [] and check(run, undisturbed) == undisturbed
    finally:
        run.close()
    assert len(tried["https"]) >= 1 and len(tried["zmq"]) >= 2, ports
    assert any(path.stat().st_size for path in run.directory.glob("replayed.*"))
    for statuses in tried["https"]:
        assert set(statuses) <= {"0", "400", "401", "431"} and statuses["401"] > 100, statuses
    assert_nowhere([*planted.values(), (run.run / ".secret").read_text().strip()], run)


def assert_nowhere(values: list[str], run: ChaosRun) -> None:
    """In what the run has written."""
    for path in run.directory.rglob("*"):
        if path.is_file() and path.name not in (".secret", ".tls.key"):
            content = path.read_bytes()
            assert not any(value.encode() in content for value in values), path
    for name in (".secret", ".tls.key"):
        assert os.stat(run.run / name).st_mode & 0o077 == 0
