"""Which machine, and which GPU or core of it, every learner rank and every worker of a server gets. Pure.

Learner ranks fill machines from the first on, generators from the last, then the servers of reward models, so that each
side keeps together. On GPUs every rank and worker has its own; a tensor-parallel group stays on one machine, where its
links are fast. On CPUs learner and servers are spread evenly, a learner rank has a core for each of its threads, and each
side shares its cores when there are too few. With `launch.cores: shared` each side has all cores, and they take turns.
"""

from collections.abc import Sequence

from msgspec import Struct

from megatron_async_rlhf.config.cores import divide_cores, place_on_cores
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.launch.nodes import Node


class Slot(Struct, frozen=True, order=True):
    """What one process has of a machine.

    Attributes:
        devices: a GPU, counted from 0 among those that the run may use, or cores, by their own numbers.
    """

    node: int
    devices: tuple[int, ...]


class Layout(Struct, frozen=True):
    """
    Attributes:
        learners: of each rank, [ranks].
        generators: of each worker of each replica, [replicas, tensor parallel].
        rewards: the same of each reward model whose servers the run starts, [models, replicas, tensor parallel].
    """

    learners: list[Slot]
    generators: list[list[Slot]]
    rewards: list[list[list[Slot]]] = []


def lay_out(config: RunConfig, nodes: Sequence[Node], replicas: int, ranks: int | None = None) -> Layout:
    """Place the learner, and so many generator replicas with the servers of reward models; without generators nobody asks
    those.

    Args:
        ranks: of the learner, if not those configured; 0 for none.

    Raises:
        ConfigError: the machines have too few GPUs, or none has enough of them for a tensor-parallel group.
    """
    learner = config.learner
    ranks = learner.world_size if ranks is None else ranks
    group = 1 if config.launch.tensor_parallel_across_nodes else learner.tensor_parallel
    servers = [
        (section.replicas, section.tensor_parallel) for section in config.served_reward_models.values() if replicas
    ]
    if config.run.device == "cpu":
        kinds = [(replicas, config.generator.tensor_parallel), *servers]
        learners, (generators, *rewards) = _on_cores(config, nodes, ranks // group, group, kinds)
        return Layout(learners, generators, rewards)
    free = [list(range(len(node.gpus))) for node in nodes]
    learners = [slot for slots in _take(free, ranks // group, group, nodes, "learner") for slot in slots]
    if config.weights.transport == "ipc" and ranks:
        generators = [learners] * replicas
    else:
        generators = _take_backwards(free, replicas, config.generator.tensor_parallel, nodes, "generator")
    return Layout(learners, generators, [_take_backwards(free, *server, nodes, "reward") for server in servers])


def _take_backwards(free: list[list[int]], count: int, size: int, nodes: Sequence[Node], side: str) -> list[list[Slot]]:
    """As `_take`, from the last machine on; in the order of machines."""
    last = len(nodes) - 1
    taken = _take(free[::-1], count, size, nodes[::-1], side)
    return sorted([Slot(last - slot.node, slot.devices) for slot in slots] for slots in taken)


def _take(free: list[list[int]], count: int, size: int, nodes: Sequence[Node], side: str) -> list[list[Slot]]:
    """So many groups of so many GPUs of one machine each, taken out of `free`."""
    taken: list[list[Slot]] = []
    for node, devices in enumerate(free):
        while len(taken) < count and len(devices) >= size:
            taken.append([Slot(node, (gpu,)) for gpu in devices[:size]])
            del devices[:size]
    if len(taken) < count:
        key = "learner.ranks" if side == "learner" else f"{side}.replicas x tensor_parallel"
        raise ConfigError(
            f"{key} = {count * size}: only {len(taken) * size} have a place, in groups of {side}.tensor_parallel = {size} on "
            f"one machine; free GPUs left: {', '.join(f'{len(f)} on {n.name}' for f, n in zip(free, nodes, strict=True))}; "
            "more machines (launch.nodes), fewer of them, or smaller groups"
        )
    return taken


def _on_cores(
    config: RunConfig, nodes: Sequence[Node], groups: int, group: int, kinds: Sequence[tuple[int, int]]
) -> tuple[list[Slot], list[list[list[Slot]]]]:
    """Slots of learner ranks, and of each kind of servers.

    Args:
        groups: of learner ranks, `group` of them on one machine each.
        kinds: replicas, and workers of each of them.
    """
    learners, shares = (
        _shares(groups, len(nodes)),
        [_shares(replicas, len(nodes))[::-1] for replicas, _ in kinds],
    )
    placed: list[Slot] = []
    servers: list[list[list[Slot]]] = [[] for _ in kinds]
    for i, node in enumerate(nodes):
        here = [share[i] * workers for share, (_, workers) in zip(shares, kinds, strict=True)]
        if config.launch.cores == "shared":
            mine, *theirs = (divide_cores(count, node.cores) for count in (learners[i] * group, *here))
        else:
            mine, all_theirs = place_on_cores(learners[i] * group, config.learner.threads, sum(here), node.cores)
            rest = iter(all_theirs)
            theirs = [[(next(rest),) for _ in range(count)] for count in here]
        placed.extend(Slot(i, cores) for cores in mine)
        for kind, share, (_, workers), cores in zip(servers, shares, kinds, theirs, strict=True):
            slots = iter([Slot(i, each) for each in cores])
            kind.extend([next(slots) for _ in range(workers)] for _ in range(share[i]))
    return placed, servers


def _shares(count: int, nodes: int) -> list[int]:
    """As even as can be, the larger ones first."""
    return [count // nodes + (i < count % nodes) for i in range(nodes)]
