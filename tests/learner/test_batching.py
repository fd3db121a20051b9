"""How sequences lie in micro-batches; what the model makes of them is in `test_layouts.py`."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from megatron_async_rlhf.learner.megatron.context import share_of_rank
from megatron_async_rlhf.learner.megatron.parallel import Placement
from megatron_async_rlhf.learner.megatron.training.batching import MicroBatch, cut_micro_batches
from megatron_async_rlhf.learner.megatron.training.pieces import group_blocks
from megatron_async_rlhf.learner.rollout import Samples
from megatron_async_rlhf.types import Sequence

LENGTHS = [5, 3, 8, 2, 4, 6, 9, 7, 3, 1]


def sequences() -> list[Sequence]:
    """Token ids tell sequence and position apart: 100 x sequence + position."""
    return [
        Sequence(token_ids=[100 * i + t for t in range(length)], prompt_length=min(length, 1 + i % 2))
        for i, length in enumerate(LENGTHS)
    ]


def cut(
    *, unit: int = 2, budget: int = 24, rank: int = 0, ranks: int = 1, sequence_parallel: int = 1
) -> list[MicroBatch]:
    placement = placement_of(rank, ranks, sequence_parallel)
    return cut_micro_batches(Samples.of_sequences(sequences()), unit, budget, placement)


def placement_of(rank: int, ranks: int, sequence_parallel: int) -> Placement:
    return Placement(
        rank=rank, tensor_parallel=sequence_parallel, pipeline_parallel=1, data_parallel=ranks, tensor_rank=0,
        pipeline_rank=0, data_rank=rank, sequence_parallel=sequence_parallel > 1,
        device=torch.device("cpu"), control=None,
    )  # fmt: skip


def spans(batch: MicroBatch) -> list[slice]:
    ends = batch.packed.cu_seqlens_q.tolist()
    return [slice(start, end) for start, end in zip(ends, ends[1:], strict=False)]


@pytest.mark.parametrize("unit", [1, 2])
@pytest.mark.parametrize("ranks", [1, 2, 4, 7])
def test_every_sequence_is_there_once_whole_and_beside_its_partner(unit: int, ranks: int):
    batches = [batch for rank in range(ranks) for batch in cut(unit=unit, rank=rank, ranks=ranks)]
    assert sorted(i for batch in batches for i in batch.indices if i >= 0) == list(range(len(LENGTHS)))
    assert sum(batch.num_tokens for batch in batches) == sum(max(1, length - 1) for length in LENGTHS)
    for batch in batches:
        if unit == 2:
            assert all(
                b == a + 1 or a == b == -1 for a, b in zip(batch.indices[0::2], batch.indices[1::2], strict=True)
            )
        for segment, index in enumerate(batch.indices):
            if index < 0:
                continue
            here_T = batch.segments_T == segment
            ids = sequences()[index].token_ids
            assert batch.tokens_T[here_T].tolist() == (ids[:-1] or ids)
            assert batch.targets_T[here_T].tolist() == (ids[1:] or [0])
            assert batch.split_completions(batch.targets_T)[index] == ids[sequences()[index].prompt_length :]


@pytest.mark.parametrize("multiple", [1, 4])
def test_the_packed_form_names_the_same_sequences_and_padding_apart(multiple: int):
    for batch in cut(sequence_parallel=multiple):
        tokens = len(batch.tokens_T)
        assert tokens % multiple == 0
        assert spans(batch)[-1].stop == tokens
        owners = [set(batch.segments_T[span].tolist()) for span in spans(batch)]
        assert all(len(owner) == 1 for owner in owners)
        assert len(set().union(*owners)) == len(owners), "no owner lies in two places"
        assert batch.packed.max_seqlen_q == max(span.stop - span.start for span in spans(batch))
        padding_T = batch.segments_T == len(batch.indices)
        assert padding_T.sum() == tokens - batch.num_tokens < multiple
        assert not batch.mask_T[padding_T].any()


def groups() -> tuple[list[list[int]], Samples]:
    """Completions of four prompts, the last an empty one of one token; and as samples with a reward each."""
    rows, prompts = [], [[7, 8, 9, 1], [7, 8, 9, 2], [5], [6]]
    for number, (prompt, lengths) in enumerate(zip(prompts, [[5, 2, 9], [0, 3], [4, 4, 1], [0, 2]], strict=True)):
        rows += [(prompt + [100 * number + 10 * k + t for t in range(n)], len(prompt)) for k, n in enumerate(lengths)]
    samples = Samples.of_sequences([Sequence(token_ids=ids, prompt_length=prompt) for ids, prompt in rows])
    return [ids for ids, _ in rows], replace(samples, rewards=[[0.0] * size for size in (3, 2, 3, 2)])


@pytest.mark.parametrize("budget", [1, 15, 1000])
@pytest.mark.parametrize(("ranks", "multiple"), [(1, 1), (2, 4)])
def test_a_shared_prompt_lies_once_before_what_goes_on_from_it(budget: int, ranks: int, multiple: int):
    ids, samples = groups()
    seen: dict[int, list[int]] = {}
    prompts = 0
    for rank in range(ranks):
        for batch in cut_micro_batches(samples, 1, budget, placement_of(rank, ranks, multiple), share=True):
            packed, keys = batch.packed, batch.packed.keys_K
            keys = torch.arange(len(batch.tokens_T)) if keys is None else keys
            key_spans = list(pairwise(packed.cu_seqlens_kv.tolist()))
            for span, (first, last) in zip(spans(batch), key_spans, strict=True):
                owners = set(batch.segments_T[span].tolist())
                attended = keys[first:last]
                assert attended[-(span.stop - span.start) :].tolist() == list(range(span.start, span.stop))
                assert packed.cu_seqlens_q_padded[attended].tolist() == list(range(last - first)), "places"
                if (owner := owners.pop()) == len(batch.indices):
                    prompts += batch.tokens_T[span][0] != 0  # and not padding
                    assert not batch.mask_T[span].any()
                elif (index := batch.indices[owner]) >= 0:
                    assert batch.tokens_T[attended].tolist() == (ids[index][:-1] or ids[index])
                    seen[index] = batch.split_completions(batch.targets_T)[index]
            assert len(batch.tokens_T) % multiple == 0
            assert packed.max_seqlen_q == packed.max_seqlen_kv == max(last - first for first, last in key_spans)
    own = [row[samples.prompt_lengths[i] :] for i, row in enumerate(ids)]
    assert [seen.get(i, []) for i in range(len(ids))] == own
    assert prompts == {1: 0, 15: 2, 1000: 2}[budget]


def test_a_group_stays_together_as_far_as_the_budget_allows():
    lengths, prompts = [9, 6, 13, 4, 7], [4, 4, 4, 4, 4]
    # 3 shared positions and 5, 2, 9 of their own; the next group's 0 and 3.
    assert group_blocks(lengths, prompts, [3, 2], 1, 1000) == ([[0, 1, 2], [3, 4]], [19, 6])
    assert group_blocks(lengths, prompts, [3, 2], 1, 10) == ([[0, 1], [2], [3, 4]], [10, 12, 6])
    assert group_blocks(lengths[:2], prompts[:2], [2], 2, 1) == ([[0]], [10])


def test_completions_are_summed_by_sequence():
    for batch in cut(sequence_parallel=4):
        sums_S = batch.completions.sum(batch.targets_T.float())
        rows = batch.split_completions(batch.targets_T)
        assert sums_S.tolist() == [sum(rows[index]) for index in batch.indices]


def test_sequences_of_one_length_are_neighbours():
    (batch,) = cut(budget=1000)
    lengths = [span.stop - span.start for span in spans(batch)]
    assert lengths == sorted(lengths, reverse=True)


def test_ranks_stay_in_step():
    assert len({len(cut(rank=rank, ranks=3)) for rank in range(3)}) == 1


@pytest.mark.parametrize("multiple", [1, 4])
def test_a_micro_batch_stays_within_the_budget(multiple: int):
    batches = cut(sequence_parallel=multiple)
    assert len(batches) > 1
    assert all(batch.num_tokens <= 24 for batch in batches)
    assert all(len(batch.tokens_T) < 24 + multiple for batch in batches)


def test_a_unit_above_the_budget_goes_alone():
    assert [len(batch.indices) for batch in cut(budget=1)] == [2] * (len(LENGTHS) // 2)


def test_a_rank_without_sequences_takes_part_without_weight():
    (batch,) = cut(rank=6, ranks=7)
    assert batch.indices == [-1, -1]
    assert batch.num_tokens == 0
    assert torch.equal(batch.completions.sum(torch.ones(len(batch.tokens_T))), torch.zeros(2))


def test_interleaved_stages_get_rows_of_one_width_and_as_many_as_go_round():
    placement = Placement(
        rank=0, tensor_parallel=1, pipeline_parallel=2, virtual_stages=2, data_parallel=1, tensor_rank=0,
        pipeline_rank=0, data_rank=0, sequence_parallel=False, device=torch.device("cpu"), control=None,
    )  # fmt: skip
    batches = cut_micro_batches(Samples.of_sequences(sequences()), 1, 24, placement)
    assert len({len(batch.tokens_T) for batch in batches}) == 1
    assert len(batches) % 2 == 0
    assert sorted(i for batch in batches for i in batch.indices if i >= 0) == list(range(len(LENGTHS)))


@pytest.mark.parametrize("ranks", [2, 3])
def test_context_parallel_ranks_divide_every_sequence_evenly(ranks: int):
    placement = Placement(
        rank=0, tensor_parallel=1, pipeline_parallel=1, data_parallel=1, context_parallel=ranks, tensor_rank=0,
        pipeline_rank=0, data_rank=0, sequence_parallel=False, device=torch.device("cpu"), control=None,
    )  # fmt: skip
    for batch in cut_micro_batches(Samples.of_sequences(sequences()), 1, 24, placement):
        ends = batch.packed.cu_seqlens_q.tolist()
        assert all((end - start) % (2 * ranks) == 0 for start, end in zip(ends, ends[1:], strict=False))
        shares = [share_of_rank(ends, rank, ranks) for rank in range(ranks)]
        assert len({len(share) for share in shares}) == 1
        assert sorted(torch.cat(shares).tolist()) == list(range(ends[-1]))
        assert batch.num_tokens == sum(max(1, len(sequences()[i].token_ids) - 1) for i in batch.indices)
