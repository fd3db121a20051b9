"""How sequences lie in micro-batches; what the model makes of them is in `test_layouts.py`."""

import pytest
import torch

from megatron_async_rlhf.learner.megatron.batching import MicroBatch, cut_micro_batches
from megatron_async_rlhf.learner.megatron.parallel import Placement
from megatron_async_rlhf.learner.megatron.steps import positions_restart
from megatron_async_rlhf.types import Sequence

LENGTHS = [5, 3, 8, 2, 4, 6, 9, 7, 3, 3]


def sequences() -> list[Sequence]:
    """Token ids tell sequence and position apart: 100 x sequence + position."""
    return [
        Sequence(token_ids=[100 * i + t for t in range(length)], prompt_length=1 + i % 2)
        for i, length in enumerate(LENGTHS)
    ]


def cut(
    *, packing: bool, unit: int = 2, budget: int = 24, rank: int = 0, ranks: int = 1, free_width: int = 10**6
) -> list[MicroBatch]:
    placement = Placement(
        rank=rank, tensor_parallel=1, pipeline_parallel=1, data_parallel=ranks, tensor_rank=0, pipeline_rank=0,
        data_rank=rank, sequence_parallel=False, control=None,
    )  # fmt: skip
    return cut_micro_batches(sequences(), unit, budget, placement, packing=packing, free_width=free_width)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 4, 7])
def test_every_sequence_is_there_once_whole_and_beside_its_partner(packing: bool, ranks: int):
    batches = [batch for rank in range(ranks) for batch in cut(packing=packing, rank=rank, ranks=ranks)]
    assert sorted(i for batch in batches for i in batch.indices if i >= 0) == list(range(len(LENGTHS)))
    assert sum(batch.num_tokens for batch in batches) == sum(LENGTHS) - len(LENGTHS)
    for batch in batches:
        assert all(b == a + 1 or a == b == -1 for a, b in zip(batch.indices[0::2], batch.indices[1::2], strict=True))
        for segment, index in enumerate(batch.indices):
            if index < 0:
                continue
            here_BT = batch.segments_BT == segment
            ids = sequences()[index].token_ids
            assert batch.tokens_BT[here_BT].tolist() == ids[:-1]
            assert batch.targets_BT[here_BT].tolist() == ids[1:]
            assert batch.positions_BT[here_BT].tolist() == list(range(len(ids) - 1))
            assert batch.split_completions(batch.targets_BT)[index] == ids[sequences()[index].prompt_length :]


@pytest.mark.parametrize("packing", [False, True])
def test_completions_are_summed_by_sequence(packing: bool):
    for batch in cut(packing=packing):
        sums_S = batch.sum_completions(batch.targets_BT.float())
        rows = batch.split_completions(batch.targets_BT)
        assert sums_S.tolist() == [sum(rows[index]) for index in batch.indices]


@pytest.mark.parametrize("free_width", [10**6, 1])
def test_a_packed_position_sees_its_own_sequence_up_to_itself(free_width: int):
    batches = cut(packing=True, budget=40, free_width=free_width)
    assert any(batch.has_packed_rows for batch in batches)
    for batch in batches:
        hidden_BTT = batch.attention_mask().squeeze(1)
        for b, row in enumerate(batch.segments_BT.tolist()):
            for query, segment in enumerate(row):
                seen = [key for key in range(query + 1) if row[key] == segment]
                assert (~hidden_BTT[b, query]).nonzero().flatten().tolist() == seen
                assert seen, "softmax over nothing is not a number"


def test_padded_rows_need_no_mask():
    assert all(batch.attention_mask() is None for batch in cut(packing=False))


def test_ranks_stay_in_step_when_packed():
    counts = {len(cut(packing=True, rank=rank, ranks=3)) for rank in range(3)}
    assert len(counts) == 1


def test_a_packed_micro_batch_stays_within_the_budget():
    assert all(batch.num_tokens <= 24 for batch in cut(packing=True))


def test_a_rank_without_sequences_takes_part_without_weight():
    (batch,) = cut(packing=True, rank=6, ranks=7)
    assert batch.indices == [-1, -1]
    assert batch.num_tokens == 0
    assert torch.equal(batch.sum_completions(torch.ones_like(batch.mask_BT)), torch.zeros(2))


class Rotary(torch.nn.Module):
    def forward(self, length: int) -> torch.Tensor:
        return torch.arange(float(length)).view(-1, 1, 1, 1)


class Model(torch.nn.Module):
    """Megatron's names, and an angle that is the position itself."""

    def __init__(self) -> None:
        super().__init__()
        self.rotary_pos_emb = Rotary()


def test_angles_restart_with_each_packed_sequence_and_only_then():
    """Logits cannot tell: attention sees differences of positions only."""
    model = Model()
    batch = cut(packing=True, budget=40, free_width=1)[0]
    width = batch.tokens_BT.shape[1]
    with positions_restart(model, batch):
        angles_TB1D = model.rotary_pos_emb(width)
    assert torch.equal(angles_TB1D[:, :, 0, 0].T, batch.positions_BT.float())
    assert torch.equal(model.rotary_pos_emb(width).flatten(), torch.arange(float(width)))
