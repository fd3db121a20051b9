"""Which machine and which GPU or core everything gets, against tables written by hand."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.launch.layout import Layout, lay_out
from megatron_async_rlhf.launch.nodes import PORTS, Node

MODEL = {"layers": 2, "hidden_size": 64, "ffn_size": 96, "heads": 4, "context_length": 96}
ROOT = Path(__file__).parents[2]


def machine(index: int, gpus: int, cores: int) -> Node:
    return Node(
        name=f"m{index}",
        address=f"10.0.0.{index}",
        cores=list(range(cores)),
        gpus=[str(gpu) for gpu in range(gpus)],
        ports=[1] * PORTS,
        generator_ports=[2] * 64,
        reward_ports=[3] * 8,
    )


def layout(sizes: list[int], ranks: int, tensor: int, replicas: int, generator_tensor: int = 1, **launch) -> Layout:
    """Over machines of so many GPUs each."""
    config = RunConfig.model_validate(
        {
            "model": MODEL,
            "run": {"device": "cuda"},
            "learner": {"ranks": ranks, "tensor_parallel": tensor, "precision": "bf16"},
            "generator": {"replicas": replicas, "tensor_parallel": generator_tensor},
            "weights": {"transport": "nccl"},
            "launch": {"nodes": len(sizes)} | launch,
        }
    )
    return lay_out(config, [machine(i, gpus, 2) for i, gpus in enumerate(sizes)], replicas)


def with_rewards(device: str, machines: int, devices: int, *models: tuple[int, int], **sections) -> list[str]:
    """Replicas of reward models with so many replicas of so many workers, beside a learner rank and a generator."""
    reward = [
        {"type": "reward_model", "model": "rm", "name": f"m{i}", "replicas": replicas, "tensor_parallel": workers}
        for i, (replicas, workers) in enumerate(models)
    ]
    own = {"cuda": {"weights": {"transport": "nccl"}}, "cpu": {}}[device]
    launch = {"nodes": machines} | ({"gpus_per_node": devices} if device == "cuda" else {})
    config = RunConfig.model_validate(
        {"model": MODEL, "run": {"device": device}, "reward": reward, "launch": launch} | own | sections
    )
    gpus = devices if device == "cuda" else 0
    made = lay_out(config, [machine(i, gpus, devices) for i in range(machines)], replicas=1)
    return [
        " | ".join(_row(slots) for slots in replicas) for replicas in ([made.learners], made.generators, *made.rewards)
    ]


def on_cores(
    nodes: int, machine_cores: int, ranks: int, tensor: int, replicas: int, workers: int = 1, threads: int = 1, **launch
) -> Layout:
    config = RunConfig.model_validate(
        {
            "model": MODEL,
            "learner": {"ranks": ranks, "tensor_parallel": tensor, "threads": threads},
            "generator": {"replicas": max(1, replicas), "tensor_parallel": workers},
            "schedule": {"mode": "sync"},
            "launch": {"nodes": nodes} | launch,
        }
    )
    return lay_out(config, [machine(i, 0, machine_cores) for i in range(nodes)], replicas)


def table(made: Layout) -> tuple[str, str]:
    """`m0:0,1 m1:0` in order of ranks, and the same of replicas; `m0:0+1` is a rank with two cores."""
    return _row(made.learners), " | ".join(_row(slots) for slots in made.generators)


def _row(slots) -> str:
    machines: dict[int, list[str]] = {}
    for slot in slots:
        machines.setdefault(slot.node, []).append("+".join(map(str, slot.devices)))
    return " ".join(f"m{node}:{','.join(devices)}" for node, devices in machines.items())


@pytest.mark.parametrize(
    ("made", "learners", "generators"),
    [
        (layout([8], 4, 4, 4), "m0:0,1,2,3", "m0:4 | m0:5 | m0:6 | m0:7"),
        (layout([8, 8], 8, 4, 4, 2), "m0:0,1,2,3,4,5,6,7", "m1:0,1 | m1:2,3 | m1:4,5 | m1:6,7"),
        # A group of four does not fit beside the first on a machine of six; a generator of two does.
        (layout([6, 6], 8, 4, 2, 2), "m0:0,1,2,3 m1:0,1,2,3", "m0:4,5 | m1:4,5"),
        # Generators fill from the last machine, and are counted from the first.
        (layout([4, 4, 4], 4, 2, 3, 2), "m0:0,1,2,3", "m1:0,1 | m2:0,1 | m2:2,3"),
        (layout([3, 3], 4, 4, 2, tensor_parallel_across_nodes=True), "m0:0,1,2 m1:0", "m1:1 | m1:2"),
        # CPUs: even shares; ranks and workers of one machine share cores when there are too few.
        (on_cores(2, 2, 2, 1, 1), "m0:0 m1:0", "m1:1"),
        (on_cores(2, 2, 2, 2, 1), "m0:0,1", "m1:1"),
        (on_cores(2, 2, 2, 2, 1, tensor_parallel_across_nodes=True), "m0:0 m1:0", "m1:1"),
        (on_cores(3, 4, 4, 2, 4, 2), "m0:0,1 m1:0,1", "m0:2,3 | m1:2,3 | m2:0,1 | m2:2,3"),
        (on_cores(1, 1, 2, 1, 2), "m0:0,0", "m0:0 | m0:0"),
        # A core for each thread of a rank, where there are enough.
        (on_cores(1, 2, 1, 1, 0, threads=2), "m0:0+1", ""),
        (on_cores(1, 4, 2, 1, 0, threads=2), "m0:0+1,2+3", ""),
        (on_cores(1, 4, 1, 1, 1, threads=2), "m0:0+1", "m0:3"),
        (on_cores(1, 4, 1, 1, 2, threads=3), "m0:0+1", "m0:2 | m0:3"),
        (on_cores(1, 2, 1, 1, 1, threads=2), "m0:0", "m0:1"),
        (on_cores(1, 3, 2, 1, 0, threads=2), "m0:0+1,0+2", ""),
        # All cores for either side, in turn.
        (on_cores(1, 2, 1, 1, 1, cores="shared"), "m0:0+1", "m0:0+1"),
        (on_cores(2, 4, 2, 2, 1, 2, cores="shared"), "m0:0+1,2+3", "m1:0+1,2+3"),
        (on_cores(1, 3, 2, 1, 4, cores="shared"), "m0:0,1+2", "m0:0 | m0:1 | m0:2 | m0:0"),
    ],
)
def test_places(made: Layout, learners: str, generators: str):
    assert table(made) == (learners, generators)


@pytest.mark.parametrize(
    ("made", "rows"),
    [
        # GPUs of their own, from the last machine on, behind the generators.
        (with_rewards("cuda", 1, 4, (2, 1)), ["m0:0", "m0:1", "m0:2 | m0:3"]),
        (with_rewards("cuda", 2, 4, (1, 2), (1, 1)), ["m0:0", "m1:0", "m1:1,2", "m1:3"]),
        (with_rewards("cuda", 1, 2, (1, 1), weights={"transport": "ipc"}), ["m0:0", "m0:0", "m0:1"]),
        # Cores of the generators' side: of their own while there are enough.
        (with_rewards("cpu", 1, 2, (1, 1)), ["m0:0", "m0:1", "m0:1"]),
        (with_rewards("cpu", 1, 4, (1, 1)), ["m0:0", "m0:2", "m0:3"]),
        (with_rewards("cpu", 2, 4, (2, 2)), ["m0:0", "m1:1", "m0:2,3 | m1:2,3"]),
    ],
)
def test_places_of_reward_models(made: list[str], rows: list[str]):
    assert made == rows


def test_gpus_of_reward_models_are_counted():
    with pytest.raises(
        ValueError,
        match=r"reward.replicas x tensor_parallel = 2 need 4 GPUs, above launch.nodes = 1 with launch.gpus_per_node = 3",
    ):
        with_rewards("cuda", 1, 3, (1, 2))
    with pytest.raises(ConfigError, match=r"reward.replicas x tensor_parallel = 2: only 0 have a place"):
        with_rewards("cuda", 2, 2, (1, 2))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([4, 4], 4, 4, 8), ["generator.replicas x tensor_parallel = 8", "only 4", "0 on m1"]),
        (([3, 3], 4, 4, 1), ["learner.ranks = 4", "only 0", "learner.tensor_parallel = 4 on one machine", "3 on m0, 3 on m1"]),
        (([2, 3], 2, 1, 1, 4), ["generator.replicas x tensor_parallel = 4", "only 0", "launch.nodes"]),
    ],
)  # fmt: skip
def test_too_few_gpus_are_refused(arguments: tuple, words: list[str]):
    with pytest.raises(ConfigError) as refused:
        layout(*arguments)
    assert all(word in str(refused.value) for word in words)
    assert "\n" not in str(refused.value)


# Of the job with so many nodes: machine and first GPU of each group of processes, written by hand.
LLAMA = {
    1: {"learner": [(0, 0, 4)], "generator": [(0, 4, 3)], "reward": [(0, 7, 1)]},
    2: {"learner": [(0, 0, 8)], "generator": [(1, 0, 6)], "reward": [(1, 6, 2)]},
    4: {"learner": [(0, 0, 8), (1, 0, 8)], "generator": [(2, 0, 4), (3, 0, 8)], "reward": [(2, 4, 4)]},
}


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "nodes"), [*(("async", nodes) for nodes in LLAMA), ("sync", 2)])
def test_the_jobs_layouts(mode: str, nodes: int):
    command = ["bash", f"slurm/llama8b_{mode}.sh", f"--nodes={nodes}", "--dry-run"]
    environment = {"VENV": str(Path(sys.prefix)), "PATH": "/usr/bin:/bin"}
    shown = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0, shown.stderr
    assert f"\n  mode: {mode}\n" in shown.stdout and "type: reward_model" in shown.stdout
    found: dict[str, list[tuple[str, str]]] = {}
    for line in shown.stdout.splitlines():
        name, _, rest = line.removeprefix("# ").partition(": ")
        if line.startswith("# ") and name.split(".")[0] in LLAMA[nodes] and "GPUs [" in rest:
            machine, _, gpus = rest.partition("GPUs ")
            found.setdefault(name.split(".")[0], []).append((machine.rstrip(", ") or "node0", gpus.partition(":")[0]))
    expected = {
        name: [(f"node{node}", f"[{first + i}]") for node, first, count in groups for i in range(count)]
        for name, groups in LLAMA[nodes].items()
    }
    assert found == expected


def test_the_pipelines_job_plans_every_stage():
    command = ["bash", "slurm/llama8b_pipeline.sh", "--dry-run", "-s", "sft.model.hf=/data/Llama-3.1-8B"]
    environment = {"VENV": str(Path(sys.prefix)), "PATH": "/usr/bin:/bin"}
    shown = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0, shown.stderr
    assert [line.split(": ")[1] for line in shown.stdout.splitlines() if line.startswith("# [")] == [
        f"async-rlhf {command}" for command in ("sft", "reward-model", "train", "eval")
    ]
    assert shown.stdout.count("\n  interrupt_grace_s: 500.0\n") == 4
    shown = subprocess.run(
        [*command, "--nodes=2"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert shown.returncode == 2 and shown.stderr.startswith("error: --nodes=2: this job runs its stages on one node; ")
