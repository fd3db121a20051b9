import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_rows import LENGTHS, PackedRow, random_values

from megatron_async_rlhf.algorithms.normalisation import token_weights

ROW = PackedRow(LENGTHS)


def test_sums_and_means_by_loops_and_no_garbage_in_them_or_their_gradients():
    values_SL = random_values(LENGTHS, 0).requires_grad_()
    sums_S, means_S = ROW.segments.sum(ROW.lay(values_SL)), ROW.segments.mean(ROW.lay(values_SL))
    for s, length in enumerate(LENGTHS):
        total = sum(values_SL[s, t].item() for t in range(length))
        assert sums_S[s].item() == pytest.approx(total, rel=1e-12)
        assert means_S[s].item() == pytest.approx(total / max(length, 1), rel=1e-12)
    (gradient_SL,) = torch.autograd.grad(means_S.sum(), values_SL)
    expected_SL = ROW.mask_SL / torch.tensor(LENGTHS, dtype=torch.float64).clamp(min=1).unsqueeze(1)
    torch.testing.assert_close(gradient_SL, expected_SL)


def test_a_value_per_sequence_reaches_its_tokens_only():
    values_S = torch.arange(1.0, len(LENGTHS) + 1)
    for values_T, counts in [
        (ROW.segments.spread(values_S), LENGTHS),
        (ROW.segments.place_last(values_S), [min(n, 1) for n in LENGTHS]),
    ]:
        assert values_T.sum() == sum((s + 1) * n for s, n in enumerate(counts))
        assert [sum(own) for own in ROW.tokens(values_T)] == [(s + 1) * n for s, n in enumerate(counts)]
    assert [own[-1] for own in ROW.tokens(ROW.segments.place_last(values_S)) if own] == [1, 2, 4, 5, 6, 7, 8]


def test_a_row_without_completions_sums_to_nothing():
    segments = PackedRow([0, 0]).segments
    garbage_T = torch.full((len(segments.mask_T),), float("nan"))
    assert segments.sum(garbage_T).tolist() == segments.mean(garbage_T).tolist() == [0, 0]
    assert segments.place_last(torch.ones(2)).tolist() == [0] * len(garbage_T)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=8).filter(any))
def test_shares_of_a_step_add_up(lengths: list[int]):
    row = PackedRow(lengths)
    counts = {"num_tokens": sum(lengths), "num_sequences": len(lengths), "dtype": torch.float64}
    empty = lengths.count(0)
    total = {
        name: token_weights(row.segments, name, length=9, **counts).sum().item()
        for name in ("token", "sequence", "constant")
    }
    assert total["token"] == pytest.approx(1)
    assert total["sequence"] == pytest.approx(1 - empty / len(lengths))
    assert total["constant"] == pytest.approx(sum(lengths) / (9 * len(lengths)))
