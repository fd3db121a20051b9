"""What a machine offers a run: name, address, cores, GPUs and ports. Looks, starts nothing."""

import os
import random
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
from msgspec import Struct

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.launch.near_cores import cores_near

LOOPBACK = "127.0.0.1"
# The way out where the variables are left over: a notebook or an editor's terminal that was started inside a step.
_ALONE = "; a command that is no task of the step takes `env -u SLURM_STEP_NUM_NODES -u SLURM_STEP_NUM_TASKS` before it"
PORTS = 3  # rendezvous of the learner's ranks, its commands, weight transfer: all where learner rank 0 is


class Node(Struct, frozen=True, kw_only=True):
    """One machine of a run.

    Attributes:
        address: where the others reach it, IPv4.
        interface: the network interface of that address.
        gpus: their names, as CUDA_VISIBLE_DEVICES wants them.
        gpu_cores: of each GPU, the cores near it; none where that is not known.
        ports: `PORTS` that nobody listens on.
        generator_ports: one for each replica, whether or not it will run here.
        reward_ports: one for each replica of each reward model that the run serves.
    """

    name: str
    address: str = LOOPBACK
    interface: str = "lo"
    cores: list[int]
    gpus: list[str]
    ports: list[int]
    generator_ports: list[int]
    reward_ports: list[int] = []
    gpu_cores: list[list[int]] = []


def this_node(config: RunConfig, gpus: int, address: str = LOOPBACK) -> Node:
    """This machine.

    Args:
        gpus: how many it has.

    Raises:
        ConfigError: a configured port is in use, or no interface has the address.
    """
    generator_ports = _generator_ports(config)
    ports = free_ports(PORTS + _reward_servers(config), taken=generator_ports)
    cores, names = sorted(os.sched_getaffinity(0)), _gpu_names(gpus)
    return Node(
        name=node_name(),
        address=address,
        interface=_interface_of(address),
        cores=cores,
        gpus=names,
        ports=ports[:PORTS],
        generator_ports=generator_ports,
        reward_ports=ports[PORTS:],
        gpu_cores=cores_near(names, cores),
    )


def planned_nodes(config: RunConfig) -> list[Node]:
    """Machines as configured, for a plan that nothing is started by: cores, ports and addresses are made up."""
    return [
        Node(
            name=f"node{i}",
            address=LOOPBACK if config.launch.nodes == 1 else f"node{i}",
            cores=sorted(os.sched_getaffinity(0)),
            gpus=[str(gpu) for gpu in range(config.launch.gpus_per_node)],
            ports=[20000, 20001, 20002],
            generator_ports=[
                (config.generator.port or 20100) + replica for replica in range(config.generator.replicas)
            ],
            reward_ports=list(range(20200, 20200 + _reward_servers(config))),
        )
        for i in range(config.launch.nodes)
    ]


def check_node_rank(config: RunConfig, rank: int) -> None:
    """That this machine has a part in the run, and that as many were started as it needs.

    Raises:
        ConfigError: a number of machines, or of tasks on one, that cannot work.
    """
    nodes = config.launch.nodes
    if rank >= nodes:
        raise ConfigError(
            f"launch.nodes = {nodes}, but this is node rank {rank} (--node-rank, or SLURM_NODEID); set launch.nodes to the "
            "number of machines, or --node-rank 0 if this one runs alone"
        )
    started = {key: _slurm_count(f"SLURM_STEP_NUM_{key}", nodes) for key in ("NODES", "TASKS")}
    if os.environ.get("SLURM_NTASKS", "") not in ("", os.environ.get("SLURM_STEP_NUM_TASKS")):
        return  # of the step that a batch job was submitted from
    if nodes > 1 and started["NODES"] != nodes:
        raise ConfigError(
            f"launch.nodes = {nodes}, but this Slurm step has {started['NODES']} nodes; ask for {nodes} (sbatch --nodes)"
            f"{_ALONE}"
        )
    if started["TASKS"] != nodes and not (nodes == 1 and _in_terminal()):
        raise ConfigError(
            f"launch.nodes = {nodes}, but this Slurm step has {started['TASKS']} tasks; start one on each node "
            f"(srun --ntasks-per-node=1){_ALONE}"
        )


def node_name() -> str:
    """As Slurm calls this machine, else its host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def addresses(interface: str | None) -> list[str]:
    """IPv4 addresses others may reach this machine at; the loopback one is last, for those on the same machine.

    Args:
        interface: the only one to use.

    Raises:
        ConfigError: there is no such interface, or it has no IPv4 address.
    """
    found = [address for _, address in _addresses(interface)]
    if not found:
        named = ", ".join(sorted({name for name, _ in _addresses(None)}))
        raise ConfigError(
            f"launch.interface = {interface}: no such interface with an IPv4 address on {node_name()}; it has {named}"
        )
    return sorted(found, key=lambda address: address.startswith("127."))


def free_ports(count: int, taken: Sequence[int] = ()) -> list[int]:
    """Different ports nobody listens on now, below the range the kernel hands to outgoing connections.

    A server binds its port many seconds after it was picked; until then no connection may happen to get it.
    """
    try:
        end = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="utf-8").split()[0])
    except (OSError, ValueError):
        end = 32768
    candidates = random.SystemRandom().sample(range(10000, max(end, 12000)), 1000)
    free = (port for port in candidates if port not in taken and _is_free(port))
    return [next(free) for _ in range(count)]


def _slurm_count(name: str, default: int) -> int:
    value = os.environ.get(name) or str(default)
    if not value.isdecimal():
        raise ConfigError(f"{name} = {value}: is no number; unset it")
    return int(value)


def _in_terminal() -> bool:
    """As in the shell of `srun --ntasks=8 --pty bash`, which is one of so many tasks: a step's tasks have none else."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR))
    except OSError:
        return False
    return True


def _generator_ports(config: RunConfig) -> list[int]:
    first, count = config.generator.port, config.generator.replicas
    if first == 0:
        return free_ports(count)
    ports = list(range(first, first + count))
    for port in ports:
        if not _is_free(port):
            raise ConfigError(f"generator.port = {first}: port {port} is in use; free it, or set 0 to pick one")
    return ports


def _reward_servers(config: RunConfig) -> int:
    return sum(section.replicas for section in config.served_reward_models.values())


def _is_free(port: int) -> bool:
    """On every address: where a server will listen is not known yet."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except (OSError, OverflowError):
            return False
    return True


def _gpu_names(count: int) -> list[str]:
    ours = os.environ.get("CUDA_VISIBLE_DEVICES")  # what our own numbers count
    return ours.split(",")[:count] if ours else [str(gpu) for gpu in range(count)]


def _interface_of(address: str) -> str:
    for name, own in _addresses(None):
        if own == address:
            return name
    raise ConfigError(f"no network interface of {node_name()} has the address {address}")


def _addresses(interface: str | None) -> Iterator[tuple[str, str]]:
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    for name, own in psutil.net_if_addrs().items():
        if name in up and interface in (None, name):
            yield from ((name, entry.address) for entry in own if entry.family == socket.AF_INET)
