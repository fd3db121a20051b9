"""Values between ranks, which torch would pickle."""

import pytest
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from megatron_async_rlhf.learner.megatron.plain_values import at_first_rank, from_rank, of_all_ranks

RANKS = 3
VALUES = [
    (None, str | None), ("grün", str | None), (1.0 / 3, float), (True, bool), ({3: [0.1, -2.5e-300], -1: []}, dict[int, list[float]]),
    ([[[1, 2], []], [[3]]], list[list[list[int]]]), ("x" * 100_000, str),
]  # fmt: skip


@pytest.mark.slow
def test_values_arrive_from_and_at_all_ranks(tmp_path):
    multiprocessing.spawn(exchange, args=(str(tmp_path / "meet"),), nprocs=RANKS)


def exchange(rank: int, meet: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=RANKS)
    group = dist.group.WORLD
    for value, kind in VALUES:
        assert from_rank(1, value if rank == 1 else object, kind, group) == value
        assert of_all_ranks(value, kind, group) == [value] * RANKS
    lengths = [list(range(10**each)) for each in range(RANKS)]
    assert of_all_ranks(lengths[rank], list[int], group) == lengths
    assert at_first_rank(lengths[rank], list[int], group) == (lengths if rank == 0 else [])
    dist.destroy_process_group()
