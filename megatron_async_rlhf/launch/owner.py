"""One run in one directory: a file beside it says whose the directory is.

    .NAME.owner    machine, process, and when that started; touched every second during the run

A start that finds the file looks whether that run is still alive: on the same machine by its process, from another one by
whether the file is touched while it looks, so that clocks are never compared. What a dead run has left is taken over:
a job that is requeued after its node was lost continues elsewhere. A file that somebody deletes is written
again; should another start have been faster, that one has the directory.
"""

import contextlib
import os
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
from msgspec import Struct

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.launch.nodes import node_name
from megatron_async_rlhf.telemetry.files import STOP

_TOUCH_S = 1.0
_POLL_S = 0.05


class Owner(Struct, frozen=True, kw_only=True):
    """The process that supervises a run.

    Attributes:
        machine: equal for those that see each other's process ids.
        started: clock ticks after the machine, because ids are used again.
    """

    host: str
    machine: str
    pid: int
    started: int


class Taken:
    """Whether another run has the directory, although this one still continues."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self.by: Owner | None = None

    def __call__(self) -> str | None:
        if self.by is None:
            return None
        return f"{_taken(self._config, self.by)}. The file that kept it away, {owner_path(self._config)}, was deleted"


def owner_path(config: RunConfig) -> Path:
    """Beside the run directory, which may not exist yet, and is renamed when a new run takes its place.

    In it where nothing can be written beside it: then it is there already, and cannot be renamed.
    """
    run_dir = config.run.path.resolve()
    beside, within = owner_places(run_dir)
    is_closed = run_dir.parent.exists() and not os.access(run_dir.parent, os.W_OK)
    return within if is_closed else beside


def owner_places(run_dir: Path) -> tuple[Path, Path]:
    """Where the file may be, for who may not write where the run's user may: beside the directory, or in it."""
    run_dir = run_dir.resolve()
    name = f".{run_dir.name}.owner"
    return run_dir.with_name(name), run_dir / name


@contextlib.contextmanager
def owning(config: RunConfig) -> Iterator["Taken"]:
    """Nobody else runs in the run directory meanwhile, unless what is yielded says otherwise.

    Raises:
        ConfigError: somebody does, or no file can be written beside it.
    """
    path = owner_path(config)
    now_running = started(os.getpid())
    assert now_running is not None  # /proc has this process
    own = Owner(host=node_name(), machine=machine(), pid=os.getpid(), started=now_running)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _claim(path, own, config)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror or error}); set another run.dir") from None
    over, taken = threading.Event(), Taken(config)
    toucher = threading.Thread(target=_keep_touching, args=(path, own, over, taken), daemon=True)
    toucher.start()
    try:
        yield taken
    finally:
        over.set()
        toucher.join()
        with contextlib.suppress(OSError):  # it is found out to be dead
            if _read(path) == own:
                path.unlink()


def _claim(path: Path, own: Owner, config: RunConfig) -> None:
    while True:
        with contextlib.suppress(FileExistsError), path.open("xb") as file:
            file.write(msgspec.json.encode(own))
            return
        with contextlib.suppress(FileNotFoundError):  # gone since: try again
            found = path.read_bytes()
            if _is_alive(path, own, config):
                raise ConfigError(_taken(config, _read(path)))
            _take_away(path, found)


def _is_alive(path: Path, own: Owner, config: RunConfig) -> bool:
    """Who owns the file. One without content was created this moment, or by a start that was killed in doing so."""
    owner = _read(path)
    if owner is not None and owner.machine == own.machine:
        return started(owner.pid) == owner.started
    deadline = time.monotonic() + max(config.launch.node_timeout_s, 3 * _TOUCH_S)
    seen = {_touched(path)}
    # Two changes: the last touch of a run that has died since may reach this machine late.
    while len(seen) < 3 and time.monotonic() < deadline:
        time.sleep(_POLL_S)
        seen.add(_touched(path))
    return len(seen) == 3


def _take_away(path: Path, found: bytes) -> None:
    """Remove what a dead run has left, unless another start was faster and has put its own there."""
    aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    path.rename(aside)
    if aside.read_bytes() == found:
        aside.unlink()
        return
    with contextlib.suppress(FileExistsError):  # a third one has put its own there
        os.link(aside, path)
    aside.unlink()


def _taken(config: RunConfig, owner: Owner | None) -> str:
    who = f"process {owner.pid} on {owner.host}" if owner is not None else "another process"
    return (
        f"run.dir = {config.run.path}: {who} runs there; choose another run.name or run.dir, or end that run: "
        f"touch {config.run.path.absolute() / STOP}"
    )


def _keep_touching(path: Path, own: Owner, over: threading.Event, taken: Taken) -> None:
    while not over.wait(_TOUCH_S):
        with contextlib.suppress(OSError):  # the file system may be away for a moment
            with contextlib.suppress(FileExistsError), path.open("xb") as file:
                file.write(msgspec.json.encode(own))
            found = _read(path)
            if found is not None and found != own:
                taken.by = found
                return
            os.utime(path)


def _read(path: Path) -> Owner | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Owner)
    except (OSError, msgspec.MsgspecError):
        return None


def _touched(path: Path) -> int:
    """When, by the clock of the file system. To open a file makes NFS ask for it."""
    with path.open("rb") as file:
        return os.fstat(file.fileno()).st_mtime_ns


def machine() -> str:
    """This boot of it, and which of its process ids are seen here: containers have their own."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text(encoding='utf-8').strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # some containers hide it: then none is known to be the same
        return secrets.token_hex(8)


def started(pid: int) -> int | None:
    """Nothing if there is no such process, or only what its parent has not yet asked about."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
