"""What the processes of a run hold of this machine's memory, and of no other's."""

import json
import os
from pathlib import Path

from megatron_async_rlhf.launch.held_memory import HeldMemory
from megatron_async_rlhf.launch.nodes import node_name
from megatron_async_rlhf.telemetry.files import PROCESSES


def held(directory: Path, machines: dict[str, str]) -> int | None:
    pids = {"controller": os.getpid(), "learner.0": None}
    (directory / PROCESSES).parent.mkdir(exist_ok=True)
    (directory / PROCESSES).write_text(json.dumps(pids | {"machines": machines}))
    return HeldMemory(directory)()


def test_a_process_of_this_machine_counts(tmp_path: Path):
    found = held(tmp_path, {"controller": node_name(), "learner.0": node_name()})
    assert found is not None and found > 2**20


def test_a_number_from_another_machine_is_nobody_here(tmp_path: Path):
    assert held(tmp_path, {"controller": "another", "learner.0": node_name()}) is None
    assert HeldMemory(tmp_path / "nowhere")() is None
