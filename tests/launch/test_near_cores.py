"""What a machine says of its GPUs' NUMA nodes, on one that is made up."""

from pathlib import Path

import msgspec
import pytest

from megatron_async_rlhf.config.load import load_config
from megatron_async_rlhf.launch.near_cores import cores_near
from megatron_async_rlhf.launch.nodes import planned_nodes
from megatron_async_rlhf.launch.plan import plan_processes

ROOT = Path(__file__).parents[2]
LISTED = """\
0, GPU-11111111-aaaa, 00000000:3B:00.0
1, GPU-22222222-bbbb, 00000000:AF:00.0
2, GPU-22223333-cccc, 00000001:AF:00.0
"""


@pytest.fixture
def sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two sockets of four cores with two threads each; of the third GPU nothing is known."""
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\ncat <<'END'\n{LISTED}END\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:/usr/bin:/bin")
    for name, cores in {"0000:3b:00.0": "0-3,8-11\n", "0000:af:00.0": "4-7,12,13-15\n"}.items():
        (tmp_path / "pci" / name).mkdir(parents=True)
        (tmp_path / "pci" / name / "local_cpulist").write_text(cores)
    return tmp_path / "pci"


def test_each_gpu_has_the_cores_of_its_socket(sysfs: Path):
    first, second = [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]
    assert cores_near(["1", "0"], range(16), sysfs) == [second, first]
    assert cores_near(["GPU-1111"], range(16), sysfs) == [first]
    assert cores_near(["0", "1"], range(2, 6), sysfs) == [[2, 3], [4, 5]]


def test_where_nothing_is_known_there_are_none(sysfs: Path, monkeypatch: pytest.MonkeyPatch):
    assert cores_near(["2", "7", "GPU-2222", "MIG-1"], range(16), sysfs) == [[], [], [], []]
    monkeypatch.setenv("PATH", str(sysfs))
    assert cores_near(["0"], range(16), sysfs) == [[]]
    assert cores_near([], range(16), sysfs) == []


def test_processes_are_bound_to_the_cores_near_their_gpus():
    learner, generator = (
        "learner={tensor_parallel: 2, sequence_parallel: true}",
        "generator={replicas: 1, tensor_parallel: 2}",
    )
    overrides = ["launch.gpus_per_node=4", learner, generator]
    config = load_config(ROOT / "examples/llama8b_async.yaml", overrides)
    (node,) = planned_nodes(config)
    node = msgspec.structs.replace(node, gpu_cores=[[0, 1], [0, 1], [0, 1], [2, 3]])
    plan = plan_processes(config, Path("/runs/x"), 1024, [node])
    cores = {spec.name: spec.cores for spec in plan.processes}
    gpus = {spec.name: spec.gpus for spec in plan.processes}
    for name in ("learner.0", "learner.1", "generator.0"):
        assert gpus[name] and cores[name] == sorted({core for gpu in gpus[name] for core in node.gpu_cores[gpu]})
    assert cores["generator.0"] == [0, 1, 2, 3] and cores["controller"] == []
    node.gpu_cores[3].clear()
    plan = plan_processes(config, Path("/runs/x"), 1024, [node])
    assert {spec.name: spec.cores for spec in plan.processes}["generator.0"] == [], "one of its GPUs may be anywhere"
    config = load_config(ROOT / "examples/llama8b_async.yaml", [*overrides, "launch.pin_cores=false"])
    plan = plan_processes(config, Path("/runs/x"), 1024, [node])
    assert not any(spec.cores for spec in plan.processes)
