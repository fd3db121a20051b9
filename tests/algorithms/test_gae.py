import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_rows import LENGTHS, PackedRow, random_values

from megatron_async_rlhf.algorithms.gae import generalised_advantages, whiten, whitening_sums

COEFFICIENTS = [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (1.0, 0.0), (0.0, 0.95)]  # gamma, lambda; the paper's first


def by_definition(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """`sum_l (gamma lam)^l delta_(t+l)` of one episode that ends after its last step."""
    deltas = [r + gamma * v_next - v for r, v, v_next in zip(rewards, values, [*values, 0.0][1:], strict=True)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))]


@pytest.mark.parametrize(("gamma", "lam"), COEFFICIENTS)
@pytest.mark.parametrize("order", [None, [3, 1, 0, 2, 7, 6, 4, 5]])
def test_advantages_and_returns_by_definition(gamma: float, lam: float, order: list[int] | None):
    row = PackedRow(LENGTHS, order=order)
    rewards_SL, values_SL = random_values(LENGTHS, 0, -1, 1), random_values(LENGTHS, 1, -1, 1)
    advantages_T, returns_T = generalised_advantages(
        row.lay(rewards_SL), row.lay(values_SL), row.segments, gamma=gamma, lam=lam
    )
    for s, length in enumerate(LENGTHS):
        rewards, values = rewards_SL[s, :length].tolist(), values_SL[s, :length].tolist()
        expected = by_definition(rewards, values, gamma, lam)
        assert row.tokens(advantages_T)[s] == pytest.approx(expected, rel=1e-9, abs=1e-12)
        returns = [a + v for a, v in zip(expected, values, strict=True)]
        assert row.tokens(returns_T)[s] == pytest.approx(returns, rel=1e-9, abs=1e-12)
    assert (advantages_T[~row.segments.mask_T] == 0).all()
    assert (returns_T[~row.segments.mask_T] == 0).all()


def test_without_discount_the_return_is_the_reward_to_come():
    row = PackedRow(LENGTHS)
    score_T = row.segments.place_last(torch.arange(8.0, dtype=torch.float64))
    values_T = row.lay(random_values(LENGTHS, 1))
    _, returns_T = generalised_advantages(score_T, values_T, row.segments, gamma=1.0, lam=1.0)
    torch.testing.assert_close(returns_T, row.segments.spread(torch.arange(8.0, dtype=torch.float64)))


def test_a_row_without_completions_has_no_advantages():
    segments = PackedRow([0]).segments
    garbage_T = torch.full((len(segments.mask_T),), float("nan"))
    advantages_T, returns_T = generalised_advantages(garbage_T, garbage_T, segments, gamma=1.0, lam=0.95)
    assert not advantages_T.any() and not returns_T.any()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.booleans(), st.integers(0, len(LENGTHS)))
def test_whitening_by_the_sums_of_two_micro_batches(seed: int, unbiased: bool, cut: int):
    values_SL = random_values(LENGTHS, seed, -3, 5)
    rows = [PackedRow(lengths) for lengths in (LENGTHS[:cut], LENGTHS[cut:]) if sum(lengths)]
    parts = [values_SL[:cut], values_SL[cut:]] if len(rows) == 2 else [values_SL]
    if len(rows) == 1:
        rows = [PackedRow(LENGTHS)]
    laid = [row.lay(part[:, : max(row.lengths)]) for row, part in zip(rows, parts, strict=True)]
    masks = [row.segments.mask_T for row in rows]
    sums_3 = sum(whitening_sums(values_T, mask_T) for values_T, mask_T in zip(laid, masks, strict=True))
    chosen = values_SL[PackedRow(LENGTHS).mask_SL]
    expected = (chosen - chosen.mean()) / (chosen.var(correction=int(unbiased)) + 1e-8).sqrt()
    whitened = [whiten(v_T, m_T, sums_3, unbiased=unbiased) for v_T, m_T in zip(laid, masks, strict=True)]
    ours = torch.cat([w_T[m_T] for w_T, m_T in zip(whitened, masks, strict=True)])
    torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-10)
    assert all((w_T[~m_T] == 0).all() for w_T, m_T in zip(whitened, masks, strict=True))


@pytest.mark.parametrize("count", [0, 1, 3, 1000])
@pytest.mark.parametrize("value", [0.0, 0.1, -1 / 3, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_values_whiten_to_nothing(count: int, value: float, dtype: torch.dtype):
    values_T, mask_T = torch.full((1003,), value, dtype=dtype), torch.arange(1003) < count
    values_T[~mask_T] = float("nan")
    assert (whiten(values_T, mask_T, whitening_sums(values_T, mask_T)) == 0).all()
