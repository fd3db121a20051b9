"""Which machine, and which GPU or core of it, every learner rank and generator worker gets. Pure.

Learner ranks fill machines from the first on, generators from the last, so that each side keeps together. On GPUs
every rank and worker has its own; a tensor-parallel group stays on one machine, where its links are fast. On CPUs both
sides are spread evenly, and share cores when there are too few.
"""

from collections.abc import Sequence

from msgspec import Struct

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.launch.nodes import Node


class Slot(Struct, frozen=True, order=True):
    """A GPU of a machine, counted from 0 among those that the run may use, or a core, by its own number."""

    node: int
    device: int


class Layout(Struct, frozen=True):
    """
    Attributes:
        learners: of each rank, [ranks].
        generators: of each worker of each replica, [replicas, tensor parallel].
    """

    learners: list[Slot]
    generators: list[list[Slot]]


def lay_out(config: RunConfig, nodes: Sequence[Node], replicas: int, ranks: int | None = None) -> Layout:
    """Place the learner, and so many generator replicas.

    Args:
        ranks: of the learner, if not those configured; 0 for none.

    Raises:
        ConfigError: the machines have too few GPUs, or none has enough of them for a tensor-parallel group.
    """
    learner = config.learner
    ranks = learner.world_size if ranks is None else ranks
    group = 1 if config.launch.tensor_parallel_across_nodes else learner.tensor_parallel
    if config.run.device == "cpu":
        return _on_cores(nodes, ranks, group, replicas, config.generator.tensor_parallel)
    free = [list(range(len(node.gpus))) for node in nodes]
    learners = [slot for slots in _take(free, ranks // group, group, nodes, "learner") for slot in slots]
    if config.weights.transport == "ipc" and ranks:
        return Layout(learners, [learners] * replicas)
    backwards = _take(free[::-1], replicas, config.generator.tensor_parallel, nodes[::-1], "generator")
    last = len(nodes) - 1
    return Layout(learners, sorted([Slot(last - slot.node, slot.device) for slot in slots] for slots in backwards))


def _take(free: list[list[int]], count: int, size: int, nodes: Sequence[Node], side: str) -> list[list[Slot]]:
    """So many groups of so many GPUs of one machine each, taken out of `free`."""
    taken: list[list[Slot]] = []
    for node, devices in enumerate(free):
        while len(taken) < count and len(devices) >= size:
            taken.append([Slot(node, device) for device in devices[:size]])
            del devices[:size]
    if len(taken) < count:
        key = "learner.ranks" if side == "learner" else "generator.replicas x tensor_parallel"
        raise ConfigError(
            f"{key} = {count * size}: only {len(taken) * size} have a place, in groups of {side}.tensor_parallel = {size} on "
            f"one machine; free GPUs left: {', '.join(f'{len(f)} on {n.name}' for f, n in zip(free, nodes, strict=True))}; "
            "more machines (launch.nodes), fewer of them, or smaller groups"
        )
    return taken


def _on_cores(nodes: Sequence[Node], ranks: int, group: int, replicas: int, workers: int) -> Layout:
    learners, generators = _shares(ranks // group, len(nodes)), _shares(replicas, len(nodes))[::-1]
    layout = Layout([], [])
    for i, node in enumerate(nodes):
        mine, theirs = place_on_cores(learners[i] * group, generators[i] * workers, node.cores)
        layout.learners.extend(Slot(i, core) for core in mine)
        slots = [Slot(i, core) for core in theirs]
        layout.generators.extend(slots[first : first + workers] for first in range(0, len(slots), workers))
    return layout


def _shares(count: int, nodes: int) -> list[int]:
    """As even as can be, the larger ones first."""
    return [count // nodes + (i < count % nodes) for i in range(nodes)]


def place_on_cores(ranks: int, workers: int, cores: Sequence[int]) -> tuple[list[int], list[int]]:
    """A core of one machine for each learner rank and each generator worker, [ranks] and [workers].

    Learner ranks fill cores from the front, generator workers from the back; when there are not enough, each side
    shares its own, so that a busy side never slows the other.
    """
    if len(cores) == 1:
        return [cores[0]] * ranks, [cores[0]] * workers
    for_workers = min(workers, max(1, len(cores) - ranks, len(cores) // 2))
    mine, theirs = cores[: len(cores) - for_workers], cores[len(cores) - for_workers :]
    return [mine[r % len(mine)] for r in range(ranks)], [theirs[w % len(theirs)] for w in range(workers)]
