"""Context parallelism: ranks that divide each sequence among them.

Of a sequence cut into 2 x ranks parts, rank r takes part r from the front and part r from the end: later positions
attend to more, so this gives all ranks the same work. Transformer Engine's attention expects exactly this.
Every rank knows the whole micro-batch; only what the model computes is divided. Shape legend: T positions of the row.
"""

import torch
import torch.distributed as dist
from megatron.core import parallel_state


def share_of_rank(ends: list[int], rank: int, ranks: int) -> torch.Tensor:
    """The positions of the row that a rank computes, in the order it has them, [T / ranks]; see `parts_of_rank`."""
    if ranks == 1:
        return torch.arange(ends[-1])
    return torch.cat([torch.arange(first, last) for _, first, last in parts_of_rank(ends, rank, ranks)])


def parts_of_rank(ends: list[int], rank: int, ranks: int) -> list[tuple[int, int, int]]:
    """Start of the sequence, first position and end of each part that one rank has.

    Args:
        ends: where each sequence ends, with a 0 before; lengths are multiples of 2 x ranks.
    """
    parts = []
    for start, end in zip(ends, ends[1:], strict=False):
        size = (end - start) // (2 * ranks)
        for part in (rank, 2 * ranks - 1 - rank):
            parts.append((start, start + part * size, start + (part + 1) * size))
    return parts


def gather_over_context(mine: torch.Tensor, ends: list[int]) -> torch.Tensor:
    """[T / ranks, ...] of every rank as [T, ...] in the order of the row; differentiable."""
    return _GatherOverContext.apply(mine, ends)


def sum_over_context(values_T: torch.Tensor) -> torch.Tensor:
    """Values of all positions on every rank, from rows that are 0 where another rank computes, [T]; differentiable."""
    if parallel_state.get_context_parallel_world_size() == 1:
        return values_T
    return _SumOverContext.apply(values_T)


class _GatherOverContext(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mine, ends):
        group = parallel_state.get_context_parallel_group()
        parts = [torch.empty_like(mine) for _ in range(group.size())]
        dist.all_gather(parts, mine.contiguous(), group=group)
        whole = mine.new_empty(ends[-1], *mine.shape[1:])
        for rank, part in enumerate(parts):
            whole[share_of_rank(ends, rank, group.size())] = part
        ctx.mine = share_of_rank(ends, group.rank(), group.size())
        return whole

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad, group=parallel_state.get_context_parallel_group())
        return grad[ctx.mine], None


class _SumOverContext(torch.autograd.Function):
    """Every rank computes the same loss of the sum, so the gradient of its own part is what it needs, not a sum."""

    @staticmethod
    def forward(ctx, values_T):
        total_T = values_T.clone()
        dist.all_reduce(total_T, group=parallel_state.get_context_parallel_group())
        return total_T

    @staticmethod
    def backward(ctx, grad_T):
        return grad_T
