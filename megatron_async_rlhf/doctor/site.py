"""What of a machine's surroundings gets in a run's way, tried out: shared memory, ports, file systems, clocks."""

import errno
import fcntl
import os
import resource
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_async_rlhf.doctor.finding import Finding

_GIB = 2**30
_SHARED_MEMORY = Path("/dev/shm")
_INFINIBAND = Path("/sys/class/infiniband")
_LEAST_SHARED_GIB = (
    1.0  # vLLM's queues and NCCL's, and a push on one machine; containers have 64 MiB unless told otherwise
)
_SKEW_S = 5.0  # a file server's clock may be a moment off


def examine_site(directory: Path) -> Iterator[Finding]:
    """
    Args:
        directory: where runs are to be.
    """
    yield shared_memory()
    yield ports()
    yield file_locks([directory, *_caches()])
    yield clock(directory)
    yield from locked_memory()


def shared_memory(path: Path = _SHARED_MEMORY) -> Finding:
    """Learner and generators of one machine hand weights over there."""
    try:
        free = shutil.disk_usage(path).free / _GIB
    except OSError as error:
        return Finding(
            what="shared memory", state="broken", detail=f"{path}: {error.strerror}", remedy="mount a tmpfs there"
        )
    detail = f"{free:.1f} GiB free in {path}"
    if free >= _LEAST_SHARED_GIB:
        return Finding(what="shared memory", state="ok", detail=detail)
    remedy = "give the container more: docker run --shm-size=8g, or --ipc=host; in Kubernetes an emptyDir with medium: Memory"
    return Finding(what="shared memory", state="broken", detail=detail, remedy=remedy)


def ports() -> Finding:
    """Processes of a run talk over TCP, on one machine through the loopback interface."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            with socket.create_connection(server.getsockname(), timeout=5) as client:
                accepted, _ = server.accept()
                accepted.close()
                port = client.getpeername()[1]
    except OSError as error:
        remedy = "let processes of this machine reach each other on 127.0.0.1: look at firewall rules and the container's network"
        return Finding(what="ports", state="broken", detail=f"127.0.0.1 cannot be reached ({error})", remedy=remedy)
    return Finding(what="ports", state="ok", detail=f"127.0.0.1 answers (on {port})")


def file_locks(directories: Sequence[Path]) -> Finding:
    """The hub's cache and vLLM's take locks; some network file systems have none, and block or fail."""
    for directory in directories:
        try:
            with tempfile.TemporaryFile(dir=directory) as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EROFS):  # nobody takes locks where nothing is written
                continue
            remedy = "put caches (HF_HOME, VLLM_CACHE_ROOT, TRITON_CACHE_DIR) and runs on a file system with locks, or mount this one with them"
            return Finding(
                what="file locks", state="missing", detail=f"{directory}: {error.strerror or error}", remedy=remedy
            )
    return Finding(what="file locks", state="ok", detail=f"work in {', '.join(map(str, directories))}")


def locked_memory(devices: Path = _INFINIBAND) -> Iterator[Finding]:
    """NCCL registers memory with InfiniBand's cards, which locks it."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if not devices.is_dir() or not any(devices.iterdir()):
        return
    if soft == resource.RLIM_INFINITY:
        yield Finding(what="locked memory", state="ok", detail="unlimited")
        return
    remedy = "ulimit -l unlimited; under Slurm LimitMEMLOCK=infinity for slurmd, in a container --ulimit memlock=-1"
    detail = f"the limit is {soft} bytes, too few for NCCL over InfiniBand"
    yield Finding(what="locked memory", state="missing", detail=detail, remedy=remedy)


def _caches() -> list[Path]:
    """Directories of caches, or the nearest above that exist; each once."""
    home = Path(os.path.expanduser("~"))
    named = {
        "HF_HOME": home / ".cache/huggingface",
        "VLLM_CACHE_ROOT": home / ".cache/vllm",
        "TRITON_CACHE_DIR": home / ".triton",
    }
    places = (Path(os.environ.get(name) or default) for name, default in named.items())
    return list(dict.fromkeys(next(filter(Path.is_dir, (place, *place.absolute().parents))) for place in places))


def clock(directory: Path) -> Finding:
    """By the times of files machines tell who is alive."""
    try:
        with tempfile.NamedTemporaryFile(dir=directory) as file:
            os.utime(file.name)  # the time that the file system's server has, where it has one
            skew = os.stat(file.name).st_mtime - time.time()
    except OSError as error:
        return Finding(
            what="clock", state="missing", detail=f"{directory} cannot be written to: {error.strerror or error}"
        )
    if abs(skew) > _SKEW_S:
        remedy = "let chronyd or ntpd set the clocks of this machine and of the file server"
        return Finding(
            what="clock", state="missing", detail=f"{directory} is {skew:+.0f} s from this machine", remedy=remedy
        )
    return Finding(what="clock", state="ok", detail=f"as in {directory}")
