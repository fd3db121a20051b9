"""Which units share a micro-batch. Plain integers: no torch here.

A *unit* is what a loss needs together: one sequence, or a preference pair. A *bin* is one micro-batch of one
data-parallel rank; its tokens stay within a budget. All ranks get the same number of bins, because pipeline
schedules and collectives run in step.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from heapq import heapreplace


def plan_bins(lengths: Sequence[int], budget: int, ranks: int) -> list[list[list[int]]]:
    """Unit indices by rank and bin, the same for the same input; at least one bin a rank, empty ones where units lack.

    First as few bins as best-fit decreasing finds, then bins and ranks as even as they get.

    Args:
        lengths: tokens of each unit.
        budget: most tokens of a bin; a longer unit has a bin to itself.
    """
    order = sorted(range(len(lengths)), key=lambda u: (-lengths[u], u))
    alone = [[u] for u in order if lengths[u] > budget]
    order = order[len(alone) :]
    total = sum(lengths[u] for u in order)
    num_bins = ranks * max(1, -(-(len(alone) + -(-total // budget)) // ranks))
    while (bins := _best_fit(order, lengths, budget, num_bins - len(alone))) is None:
        num_bins += ranks
    candidates = [
        _least_loaded(order, lengths, budget, num_bins - len(alone)),
        _lowest_ceiling(order, lengths, budget, num_bins - len(alone)),
        bins,
    ]
    plans = [_balance(_deal(alone + bins, lengths, ranks), lengths, budget) for bins in candidates if bins is not None]
    return min(plans, key=lambda plan: _heaviest(plan, lengths))


def _best_fit(order: list[int], lengths: Sequence[int], ceiling: int, num_bins: int) -> list[list[int]] | None:
    """Each unit into the fullest bin that has room; None if they do not all fit."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    room = [(ceiling, b) for b in range(num_bins)]  # sorted, so that the first that fits is the fullest
    for u in order:
        place = bisect_left(room, (lengths[u], -1))
        if place == num_bins:
            return None
        left, b = room.pop(place)
        bins[b].append(u)
        insort(room, (left - lengths[u], b))
    return bins


def _lowest_ceiling(order: list[int], lengths: Sequence[int], budget: int, num_bins: int) -> list[list[int]] | None:
    """Best fit below the lowest ceiling that bisection finds, so that no bin is left nearly empty (MULTIFIT)."""
    if not order:
        return None
    low = max(lengths[order[0]], -(-sum(lengths[u] for u in order) // num_bins))
    high, found = budget, None
    while low < high:
        middle = (low + high) // 2
        bins = _best_fit(order, lengths, middle, num_bins)
        if bins is None:
            low = middle + 1
        else:
            high, found = middle, bins
    return found


def _least_loaded(order: list[int], lengths: Sequence[int], budget: int, num_bins: int) -> list[list[int]] | None:
    """Each unit into the emptiest bin, which levels best when there are many units; None if a bin overflows."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    loads = [(0, b) for b in range(num_bins)]  # a heap
    for u in order:
        load, b = loads[0]
        bins[b].append(u)
        heapreplace(loads, (load + lengths[u], b))
        if load + lengths[u] > budget:
            return None
    return bins


def _deal(bins: list[list[int]], lengths: Sequence[int], ranks: int) -> list[list[list[int]]]:
    """The same number of bins for every rank: the heaviest left goes to the lightest rank that still takes one."""
    per_rank = len(bins) // ranks
    plan: list[list[list[int]]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for one in sorted(bins, key=lambda one: (-_load(one, lengths), one)):
        rank = min((r for r in range(ranks) if len(plan[r]) < per_rank), key=loads.__getitem__)
        plan[rank].append(one)
        loads[rank] += _load(one, lengths)
    return plan


def _balance(plan: list[list[list[int]]], lengths: Sequence[int], budget: int) -> list[list[list[int]]]:
    """Move or exchange single units between the heaviest and the lightest rank while that brings them closer."""
    # Each round closes the gap between two ranks by at least one token; a few rounds a rank do nearly all of it.
    for _ in range(8 * len(plan)):
        loads = [sum(_load(one, lengths) for one in bins) for bins in plan]
        heavy, light = loads.index(max(loads)), loads.index(min(loads))
        exchange = _closest_exchange(plan[heavy], plan[light], loads[heavy] - loads[light], lengths, budget)
        if exchange is None:
            break
        give, take, units = exchange
        for source, target, u in ((give, take, units[0]), (take, give, units[1])):
            if u is not None:
                source.remove(u)
                target.append(u)
    return plan


def _closest_exchange(
    heavy: list[list[int]], light: list[list[int]], gap: int, lengths: Sequence[int], budget: int
) -> tuple[list[int], list[int], tuple[int, int | None]] | None:
    """(bin that gives, bin that takes, (unit given, unit taken back or None)) that leaves the smallest gap.

    Only the gap counts, so of units with the same length one stands for all.
    """
    best, best_gap = None, gap
    givers = [(give, budget - _load(give, lengths), {lengths[u]: u for u in give}) for give in heavy]
    for take in light:
        spare = budget - _load(take, lengths)
        back: dict[int, int | None] = {0: None} | {lengths[u]: u for u in take}
        for give, room, units in givers:
            for length, u in units.items():
                for back_length, v in back.items():
                    moved = length - back_length
                    if 0 < moved <= spare and abs(gap - 2 * moved) < best_gap and room + moved >= 0:
                        best, best_gap = (give, take, (u, v)), abs(gap - 2 * moved)
        if best_gap <= 1:
            break
    return best


def _load(units: Sequence[int], lengths: Sequence[int]) -> int:
    return sum(lengths[u] for u in units)


def _heaviest(plan: list[list[list[int]]], lengths: Sequence[int]) -> tuple[int, int]:
    """(tokens of the heaviest rank, of the heaviest bin): what the other ranks and stages wait for."""
    loads = [[_load(one, lengths) for one in bins] for bins in plan]
    return max(sum(bins) for bins in loads), max(max(bins) for bins in loads)
