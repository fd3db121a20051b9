"""Ranks as children of one process, because importing megatron takes longer than all they do."""

import gc
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from megatron_async_rlhf.launch.nodes import free_ports


def run_ranks(count: int, logs: Path, name: str, act: Callable[[int], None]) -> bool:
    """Call `act(rank)` in a process each and wait for them; False as soon as one has failed.

    What a rank prints goes to `<name>-rank<r>.log`.
    """
    (port,) = free_ports(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    gc.freeze()  # a rank that collects would look at all of megatron's objects, and copy the pages they share
    for rank in range(count):
        _fork(rank, logs / f"{name}-rank{rank}.log", act)
    return not any(os.wait()[1] for _ in range(count))


def _fork(rank: int, path: Path, act: Callable[[int], None]) -> None:
    if os.fork():
        return
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    code = 1
    try:
        act(rank)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)
