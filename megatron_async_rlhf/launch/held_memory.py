"""What the processes of a run hold of this machine's memory."""

import contextlib
import json
import time
from pathlib import Path

import psutil

from megatron_async_rlhf.launch.nodes import node_name
from megatron_async_rlhf.telemetry.files import PROCESSES

_ASKED_AGAIN_S = 5.0  # looking through all processes takes milliseconds


class HeldMemory:
    """Call it for bytes, the same for some seconds; None if no process of the run is on this machine.

    Memory that processes share counts once for each, except that of `/dev/shm` and of files, which counts for none.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / PROCESSES
        self._asked = -_ASKED_AGAIN_S
        self._held: int | None = None

    def __call__(self) -> int | None:
        now = time.monotonic()
        if now - self._asked >= _ASKED_AGAIN_S:
            self._asked, self._held = now, self._measured()
        return self._held

    def _measured(self) -> int | None:
        try:
            pids = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        here, processes = node_name(), set[psutil.Process]()
        machines = pids.get("machines") or dict.fromkeys(pids, here)  # of an earlier version
        for name, pid in pids.items():
            # It was never started; or the number is that of another process here, if any.
            if pid is None or machines.get(name) != here:
                continue
            with contextlib.suppress(psutil.Error):  # it has ended
                process = psutil.Process(pid)
                processes |= {process, *process.children(recursive=True)}
        held = []
        for process in processes:
            with contextlib.suppress(psutil.Error):
                memory = process.memory_info()
                held.append(memory.rss - memory.shared)
        return sum(held) if held else None
