"""What a run is harmed by. Each fault does its harm, and tells what it was; one that finds nothing to harm raises."""

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from harm.network import CUT, Quality
from harm.run import EXIT_BAD_INPUT, ChaosRun, Violation

Fault = Callable[[ChaosRun, random.Random], str]
SHORT_S, LONG_S = 5.0, 40.0  # launch.node_timeout_s is between them
_MEMORY = Path("/sys/fs/cgroup/memory")  # where cgroups are those of version 1
_SLOW = "fsync,fdatasync,openat,rename"
_SLOW_BY_US = 200_000


def kill(name: str, number: signal.Signals) -> Fault:
    def harm(run: ChaosRun, dice: random.Random) -> str:
        os.kill(run.pid(name), number)
        return f"{name} {number.name}"

    return harm


def kill_rank(number: signal.Signals) -> Fault:
    """Any of the learner's."""

    def harm(run: ChaosRun, dice: random.Random) -> str:
        return kill(f"learner.{dice.randrange(run.setting.ranks)}", number)(run, dice)

    return harm


def kill_below(name: str, mark: str, number: signal.Signals) -> Fault:
    def harm(run: ChaosRun, dice: random.Random) -> str:
        os.kill(dice.choice(run.children(name, mark)), number)
        return f"{name}'s {mark} {number.name}"

    return harm


def damage_checkpoint(run: ChaosRun, dice: random.Random) -> str:
    """A byte of the newest one is flipped, or the end of a file cut off; then the learner needs it. There is an older one."""
    *_, _, newest = sorted((run.run / "checkpoints").glob("step_??????"))
    path = dice.choice([path for path in sorted(newest.rglob("*")) if path.is_file() and path.stat().st_size])
    place = dice.randrange(path.stat().st_size)
    if dice.random() < 0.5:
        os.truncate(path, place)
    else:
        with path.open("r+b") as file:
            file.seek(place)
            byte = file.read(1)[0] ^ (1 << dice.randrange(8))
            file.seek(place)
            file.write(bytes([byte]))
    os.kill(run.pid("learner.0"), signal.SIGKILL)
    return f"checkpoint {path.relative_to(run.run)}"


def fill_disk(run: ChaosRun, dice: random.Random) -> str:
    if run.disk is None:
        raise ValueError("the run has no disk of its own")
    with (run.disk / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(2**16))
        except OSError:
            return "disk full"


def slow_disk(run: ChaosRun, dice: random.Random) -> str:
    """Every file that controller or learner opens, renames or writes through takes a fifth of a second, for a while."""
    for name in ("controller", "learner.0"):
        inject = f"inject={_SLOW}:delay_enter={_SLOW_BY_US}"
        command = [
            "strace",
            "-f",
            "-qq",
            "-o",
            "/dev/null",
            "-e",
            f"trace={_SLOW}",
            "-e",
            inject,
            "-p",
            str(run.pid(name)),
        ]
        subprocess.Popen(["timeout", "-s", "INT", str(SHORT_S), *command], stderr=subprocess.DEVNULL)
    return "slow disk"


def out_of_memory(name: str, mark: str | None = None) -> Fault:
    """The kernel kills it for want of memory: it may have no page more than it has."""

    def harm(run: ChaosRun, dice: random.Random) -> str:
        pid = run.pid(name) if mark is None else dice.choice(run.children(name, mark))
        root, limit = (_MEMORY, "memory.limit_in_bytes") if _MEMORY.is_dir() else (_MEMORY.parent, "memory.max")
        group = root / f"chaos_{pid}"
        group.mkdir()
        try:
            (group / limit).write_text("4096")
            (group / "cgroup.procs").write_text(str(pid))
            deadline = time.monotonic() + 20
            while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                if time.monotonic() > deadline:
                    (root / "cgroup.procs").write_text(str(pid))
                    raise ValueError(f"{name} needs no memory")
                time.sleep(0.05)
        finally:
            _remove(group)
        return f"{name}{f' ({mark})' if mark else ''} out of memory"

    return harm


def _remove(group: Path) -> None:
    """Once its last process is gone."""
    for _ in range(100):
        try:
            group.rmdir()
            return
        except OSError:
            time.sleep(0.05)


def jump_clock(run: ChaosRun, dice: random.Random) -> str:
    hours = dice.choice([-30, -2, 2, 30])
    run.set_clock(hours * 3600)
    return f"clock set to {hours:+d} h"


def lose_lock(run: ChaosRun, dice: random.Random) -> str:
    """The file that keeps others out of the run directory is deleted; then somebody else starts a run there."""
    run.run.with_name(f".{run.run.name}.owner").unlink()
    time.sleep(2)
    if run.process.poll() is not None:
        raise ValueError("it has ended")
    second = subprocess.run(run.command("--resume"), capture_output=True, text=True, timeout=120)
    if run.process.poll() is None and (second.returncode != EXIT_BAD_INPUT or "runs there" not in second.stderr):
        raise Violation(
            f"a second start in its directory ends with {second.returncode}: {second.stdout}{second.stderr}"
        )
    return "owner file deleted"


def spoil_wire(told: str, quality: Quality, seconds: float) -> Fault:
    def harm(run: ChaosRun, dice: random.Random) -> str:
        if run.network is None:
            raise ValueError("the run is on one machine")
        run.network.spoil(quality, seconds)
        return told

    return harm


FAULTS: dict[str, Fault] = {
    "learner killed": kill_rank(signal.SIGKILL),
    "learner stopped": kill_rank(signal.SIGSTOP),
    "learner out of memory": out_of_memory("learner.0"),
    "generator killed": kill("generator.0", signal.SIGKILL),
    "generator stopped": kill("generator.1", signal.SIGSTOP),
    "engine killed": kill_below("generator.0", "EngineCore", signal.SIGKILL),
    "engine stopped": kill_below("generator.1", "EngineCore", signal.SIGSTOP),
    "engine out of memory": out_of_memory("generator.0", "EngineCore"),
    "reward worker killed": kill_below("controller", "spawn_main", signal.SIGKILL),
    "reward worker stopped": kill_below("controller", "spawn_main", signal.SIGSTOP),
    "controller killed": kill("controller", signal.SIGKILL),
    "supervisor killed": kill("supervisor", signal.SIGKILL),
    "interrupted": kill("supervisor", signal.SIGTERM),
    "checkpoint damaged": damage_checkpoint,
    "disk full": fill_disk,
    "disk slow": slow_disk,
    "clock set": jump_clock,
    "lock lost": lose_lock,
    "wire cut for long": spoil_wire(f"wire cut for {LONG_S:g} s", CUT, LONG_S),
    "wire cut for a moment": spoil_wire(f"wire gone for {SHORT_S:g} s", CUT, SHORT_S),
    "packets lost": spoil_wire("a tenth of all packets lost", Quality(lost=0.1), SHORT_S),
    "packets late": spoil_wire("packets late and out of order", Quality(delay_s=(0.0, 0.3)), SHORT_S),
}
WIRE = {"wire cut for long", "wire cut for a moment", "packets lost", "packets late"}


def impossible_here() -> dict[str, str]:
    """Faults that this machine cannot do, and what they need."""
    needs: dict[str, str] = {}
    if shutil.which("cc") is None:
        needs["clock set"] = "a C compiler (cc)"
    if shutil.which("strace") is None:
        needs["disk slow"] = "strace"
    if os.geteuid() or not Path("/dev/net/tun").exists() or shutil.which("ip") is None:
        needs |= dict.fromkeys(WIRE, "root, /dev/net/tun and the ip command")
    if os.geteuid():
        needs |= dict.fromkeys(("disk full", "learner out of memory", "engine out of memory"), "root")
    return needs
