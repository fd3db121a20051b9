"""A temporary directory for each process of a run, gone when the process and all it started are, and shared memory too.

vLLM leaves its sockets and rendezvous files in the temporary directory, however it ends, W&B what it was uploading. In a
directory of their own nobody else's files are there, so all of it can go. torch's compile cache stays where it is.

Shared memory has no directories. Python's is removed by its resource trackers (see `process`), that of vLLM's tensor
parallelism on a CPU by nobody: it is known by who uses it, or by the rendezvous file that it is called after.
"""

import contextlib
import getpass
import glob
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from megatron_async_rlhf.launch.owner import machine, started

# The machine, and the process that made it with its start: ids are used again.
_NAME = re.compile(r"rlhf-([0-9a-f]{6})-(\d+)-(\d+)-\w+")
_SHARED = Path("/dev/shm")
_VLLM_SHARED = re.compile(r"(?:psm_|vllm_)\S+|\S+-cpushm_\d+")
_LONGEST = 107 - len("/") - 36  # a socket's path, less the name vLLM gives it


class Scratch:
    """Of one process on this machine. Raises OSError if it cannot be made."""

    def __init__(self) -> None:
        pid = os.getpid()
        self._shared: set[Path] = set()
        prefix = f"rlhf-{_machine()}-{pid}-{started(pid)}-"
        self._compiled = os.environ.get("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_{_user()}")
        self.path = Path(tempfile.mkdtemp(prefix=prefix))
        if len(str(self.path)) > _LONGEST:
            self.path.rmdir()
            self.path = Path(tempfile.mkdtemp(prefix=prefix, dir="/tmp"))

    @property
    def environment(self) -> dict[str, str]:
        """What makes a process use it."""
        path = str(self.path)
        return {"TMPDIR": path, "VLLM_RPC_BASE_PATH": path, "TORCHINDUCTOR_CACHE_DIR": self._compiled}

    def note_shared(self, pids: Iterable[int]) -> None:
        """What these processes, which are about to end, share."""
        for pid in pids:
            with contextlib.suppress(OSError):  # it has ended
                for line in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8").splitlines():
                    _, _, mapped = line.partition(f" {_SHARED}/")
                    if name := _VLLM_SHARED.match(mapped):
                        self._shared.add(_SHARED / name[0])

    def remove(self) -> None:
        _remove(self.path, self._shared)


def remove_abandoned() -> None:
    """What was made by processes that are gone without removing it: killed, like all they had started."""
    for directory in {tempfile.gettempdir(), "/tmp"}:
        with contextlib.suppress(OSError):
            for path in Path(directory).glob("rlhf-*"):
                found = _NAME.fullmatch(path.name)
                is_ours = path.lstat().st_uid == os.getuid()  # another user can make one of any name
                if found and is_ours and found[1] == _machine() and str(started(int(found[2]))) != found[3]:
                    _remove(path)


def _remove(directory: Path, shared: Iterable[Path] = ()) -> None:
    with contextlib.suppress(OSError):
        files = directory.glob("vllm_dist_*")
        named = [path for file in files for path in _SHARED.glob(f"{glob.escape(file.name)}-*")]
        for path in (*shared, *named):
            path.unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)


def _machine() -> str:
    """Short: the whole path is."""
    return hashlib.sha256(machine().encode()).hexdigest()[:6]


def _user() -> str:
    """As torch spells it."""
    try:
        name = getpass.getuser()
    except (KeyError, ImportError, OSError):  # no name for this number, as in some containers
        name = f"uid_{os.getuid()}"
    return re.sub(r'[\\/:*?"<>|]', "_", name)
