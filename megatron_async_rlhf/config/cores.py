"""How a machine's cores are divided between the processes of a run on CPUs. Pure."""

from collections.abc import Sequence
from itertools import pairwise


def place_on_cores(
    ranks: int, threads: int, workers: int, cores: Sequence[int]
) -> tuple[list[tuple[int, ...]], list[int]]:
    """Cores of one machine for each learner rank, as many as it has threads, and one for each worker of a server.

    Learner ranks fill cores from the front, workers from the back; when there are not enough, each side
    shares its own, so that a busy side never slows the other.
    """
    if len(cores) == 1:
        return [(cores[0],)] * ranks, [cores[0]] * workers
    for_workers = min(workers, max(1, len(cores) - ranks * threads, len(cores) // 2))
    mine, theirs = cores[: len(cores) - for_workers], cores[len(cores) - for_workers :]
    return [tuple(sorted({mine[(r * threads + t) % len(mine)] for t in range(threads)})) for r in range(ranks)], [
        theirs[w % len(theirs)] for w in range(workers)
    ]


def divide_cores(processes: int, cores: Sequence[int]) -> list[tuple[int, ...]]:
    """All cores of a machine for processes that work at the same time, as evenly as can be; one each if there are too few."""
    if processes >= len(cores):
        return [(cores[i % len(cores)],) for i in range(processes)]
    starts = [i * len(cores) // processes for i in range(processes + 1)] if processes else []
    return [tuple(cores[start:end]) for start, end in pairwise(starts)]
