"""Which processes a run on one machine consists of: names, command lines, environments, cores and GPUs. Starts nothing."""

import os
import random
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.generator.vllm.server import records_versions, server_command, server_environment
from megatron_async_rlhf.telemetry.files import POLICY_TEMPLATE_DIR

_HOST = "127.0.0.1"


class ProcessSpec(Struct, frozen=True, kw_only=True):
    """One process. `environment` comes on top of ours; empty `cores` means any core, empty `gpus` none."""

    name: str
    arguments: list[str]
    environment: dict[str, str]
    cores: list[int]
    gpus: list[int] = []


class ProcessPlan(Struct, frozen=True, kw_only=True):
    """All processes, in starting order; the controller is the one that decides when the run is over.

    Attributes:
        restarts: how often each generator may be started again.
    """

    learners: list[ProcessSpec]
    generators: list[ProcessSpec]
    controller: ProcessSpec
    restarts: int = 0

    @property
    def processes(self) -> list[ProcessSpec]:
        return [*self.generators, *self.learners, self.controller]


def plan_processes(
    config: RunConfig, run_dir: Path, context_length: int, resume_from: int | None = None
) -> ProcessPlan:
    """Place learner ranks, generators and controller on this machine's cores or GPUs, and on free ports.

    Args:
        resume_from: policy version of the checkpoint to go on from.

    Raises:
        ConfigError: a configured port is in use, or this machine's vLLM cannot do what is configured.
    """
    in_flight = config.schedule.in_flight_updates
    if in_flight in ("keep", "recompute") and not records_versions():
        raise ConfigError(
            f"schedule.in_flight_updates = {in_flight} needs vLLM 0.30 or newer, which records the version of every "
            "token; set resubmit or none"
        )
    learner_devices, generator_devices = _place(config, config.generator.workers)
    generator_ports = _generator_ports(config)
    rendezvous, command, transfer = _free_ports(3, taken=generator_ports)
    per_replica = config.generator.tensor_parallel
    shares = [generator_devices[i * per_replica : (i + 1) * per_replica] for i in range(config.generator.replicas)]
    generators = [
        ProcessSpec(
            name=f"generator.{i}",
            arguments=server_command(config, run_dir / POLICY_TEMPLATE_DIR, port, context_length),
            environment=server_environment(config, share) | {"GLOO_SOCKET_IFNAME": "lo"},
            cores=[],  # vLLM binds its workers itself; its front end may run wherever there is room
            gpus=share if config.run.device == "cuda" else [],
        )
        for i, (port, share) in enumerate(zip(generator_ports, shares, strict=True))
    ]
    addresses = [
        *("--learner", f"tcp://{_HOST}:{command}"),
        *(argument for port in generator_ports for argument in ("--generator", f"http://{_HOST}:{port}")),
        *("--transfer", f"{_HOST}:{transfer}"),
    ]
    resume = [] if resume_from is None else ["--resume-from", str(resume_from)]
    return ProcessPlan(
        learners=_learners(config, run_dir, learner_devices, rendezvous=rendezvous, command=command),
        generators=generators,
        controller=_controller(run_dir, [*addresses, *resume]),
        restarts=config.generator.restarts if records_versions() else 0,
    )


def plan_learner_alone(config: RunConfig, run_dir: Path, module: str, arguments: Sequence[str] = ()) -> ProcessPlan:
    """The same without generators: learner ranks on all cores or GPUs, and the module as their controller."""
    devices, _ = _place(config, workers=0)
    rendezvous, command = _free_ports(2)
    learners = _learners(config, run_dir, devices, rendezvous=rendezvous, command=command)
    addresses = ["--learner", f"tcp://{_HOST}:{command}", *arguments]
    return ProcessPlan(learners=learners, generators=[], controller=_controller(run_dir, addresses, module=module))


def _place(config: RunConfig, workers: int) -> tuple[list[int], list[int]]:
    """A GPU or core for each learner rank and each of so many generator workers."""
    ranks = config.learner.world_size
    if config.run.device == "cuda":
        return place_on_gpus(ranks, workers, shared=config.weights.transport == "ipc")
    return place_on_cores(ranks, workers, sorted(os.sched_getaffinity(0)))


def _learners(
    config: RunConfig, run_dir: Path, devices: Sequence[int], *, rendezvous: int, command: int
) -> list[ProcessSpec]:
    return [
        _learner(config, run_dir, rank, device, rendezvous=rendezvous, command=command)
        for rank, device in enumerate(devices)
    ]


def _controller(run_dir: Path, arguments: list[str], module: str = "app") -> ProcessSpec:
    command = [sys.executable, "-m", f"megatron_async_rlhf.{module}", "--run-dir", str(run_dir), *arguments]
    return ProcessSpec(name="controller", arguments=command, environment={"OMP_NUM_THREADS": "1"}, cores=[])


def _learner(config: RunConfig, run_dir: Path, rank: int, device: int, *, rendezvous: int, command: int) -> ProcessSpec:
    """A rank on a core or GPU. They meet on the port `rendezvous`; rank 0 takes commands on the port `command`."""
    on_gpu = config.run.device == "cuda"
    # Kernels must start in the order they were queued, or communication does not overlap as Megatron plans it.
    in_order = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"} if on_gpu else {}
    return ProcessSpec(
        name=f"learner.{rank}",
        arguments=[
            *(sys.executable, "-m", "megatron_async_rlhf.learner.megatron.worker"),
            *("--run-dir", str(run_dir)),
            *("--listen", f"tcp://{_HOST}:{command}"),
        ],
        environment={
            "RANK": str(rank),
            "LOCAL_RANK": str(device if on_gpu else rank),
            "WORLD_SIZE": str(config.learner.world_size),
            "MASTER_ADDR": _HOST,
            "MASTER_PORT": str(rendezvous),
            "OMP_NUM_THREADS": str(config.learner.threads),
            "GLOO_SOCKET_IFNAME": "lo",
            **in_order,
        },
        cores=[device] if config.launch.pin_cores and not on_gpu else [],
        gpus=[device] if on_gpu else [],
    )


def place_on_gpus(ranks: int, workers: int, *, shared: bool) -> tuple[list[int], list[int]]:
    """A GPU for each learner rank and each generator worker, [ranks] and [workers]: learners first, or on the same ones."""
    first = 0 if shared else ranks
    return list(range(ranks)), list(range(first, first + workers))


def place_on_cores(ranks: int, workers: int, cores: Sequence[int]) -> tuple[list[int], list[int]]:
    """A core for each learner rank and each generator worker, [ranks] and [workers].

    Learner ranks fill cores from the front, generator workers from the back; when there are not enough, each side
    shares its own, so that a busy side never slows the other.
    """
    if len(cores) == 1:
        return [cores[0]] * ranks, [cores[0]] * workers
    for_workers = min(workers, max(1, len(cores) - ranks, len(cores) // 2))
    mine, theirs = cores[: len(cores) - for_workers], cores[len(cores) - for_workers :]
    return [mine[r % len(mine)] for r in range(ranks)], [theirs[w % len(theirs)] for w in range(workers)]


def _generator_ports(config: RunConfig) -> list[int]:
    first, count = config.generator.port, config.generator.replicas
    if first == 0:
        return _free_ports(count)
    ports = list(range(first, first + count))
    for port in ports:
        if not _is_free(port):
            raise ConfigError(f"generator.port = {first}: port {port} is in use; free it, or set 0 to pick one")
    return ports


def _free_ports(count: int, taken: Sequence[int] = ()) -> list[int]:
    """Different ports nobody listens on now, below the range the kernel hands to outgoing connections.

    A server binds its port many seconds after it was picked; until then no connection may happen to get it.
    """
    try:
        end = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError):
        end = 32768
    candidates = random.SystemRandom().sample(range(10000, max(end, 12000)), 1000)
    free = (port for port in candidates if port not in taken and _is_free(port))
    return [next(free) for _ in range(count)]


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, port))
        except (OSError, OverflowError):
            return False
    return True
