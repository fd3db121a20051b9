import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from whole_tensors import merge, split

from megatron_async_rlhf.errors import MappingError
from megatron_async_rlhf.models.architecture import Architecture
from megatron_async_rlhf.models.families import FAMILIES, Rule
from megatron_async_rlhf.models.hf_mapping import hf_shapes, model_mappings


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Architecture, int]:
    """Any architecture that fits its tensor-parallel ranks: fewer key-value heads than ranks, odd vocabularies."""
    ranks = draw(st.sampled_from([1, 2, 4]))
    heads = ranks * draw(st.integers(1, 3))
    kv_heads = [k for k in range(1, heads + 1) if not heads % k and not (k % ranks and ranks % k)]
    arch = Architecture(
        family=draw(st.sampled_from(sorted(FAMILIES))),
        vocab_size=draw(st.integers(1, 40)),
        layers=draw(st.integers(1, 2)),
        hidden_size=draw(st.integers(1, 12)),
        ffn_size=ranks * draw(st.integers(1, 5)),
        heads=heads,
        kv_heads=draw(st.sampled_from(kv_heads)),
        head_dim=2 * draw(st.integers(1, 3)),
        context_length=16,
        rope_theta=10000.0,
        norm_eps=1e-5,
        tie_embeddings=draw(st.booleans()),
    )
    return arch, ranks


def random_bits(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Every bit pattern of a float, NaNs and infinities included: what is only moved must survive unchanged."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int64)
    return bits.to(torch.int32).view(torch.float32)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


@settings(deadline=None, max_examples=150)
@given(layouts(), st.integers(0, 2**32))
def test_merge_undoes_split_bit_for_bit(layout: tuple[Architecture, int], seed: int):
    arch, ranks = layout
    shapes = hf_shapes(arch)
    for mapping in model_mappings(arch, 1):
        whole = [random_bits(shapes[name], seed + i) for i, name in enumerate(mapping.hf)]
        shards = [split(mapping.rule, whole, arch, ranks, rank) for rank in range(ranks)]
        assert len({shard.shape for shard in shards}) == 1
        merged = merge(mapping.rule, shards, arch)
        assert all(same_bits(ours, theirs) for ours, theirs in zip(merged, whole, strict=True)), mapping


@settings(deadline=None, max_examples=50)
@given(st.sampled_from([1, 2, 4]), st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**32))
def test_column_parallel_merge_undoes_split(ranks: int, rows: int, columns: int, seed: int):
    """No family's parameter is a plain column cut, so the mapping table never reaches this rule."""
    whole = random_bits((ranks * rows, columns), seed)
    shards = [split(Rule.COLUMN, [whole], None, ranks, rank) for rank in range(ranks)]
    assert all(shard.shape == (rows, columns) for shard in shards)
    assert same_bits(merge(Rule.COLUMN, shards, None)[0], whole)


def numbered(rows: int, first: int) -> torch.Tensor:
    return torch.arange(first, first + rows, dtype=torch.float32).unsqueeze(1)


def test_qkv_rows_are_grouped_by_key_value_head(make_arch):
    arch = make_arch(heads=4, kv_heads=2, head_dim=1, hidden_size=1)
    whole = [numbered(4, 0), numbered(2, 10), numbered(2, 20)]
    assert split(Rule.QKV, whole, arch, 2, 0).flatten().tolist() == [0, 1, 10, 20]
    assert split(Rule.QKV, whole, arch, 2, 1).flatten().tolist() == [2, 3, 11, 21]


def test_a_qkv_bias_is_grouped_as_its_weight(make_arch):
    arch = make_arch(heads=4, kv_heads=2, head_dim=1, hidden_size=1)
    whole = [numbered(4, 0).flatten(), numbered(2, 10).flatten(), numbered(2, 20).flatten()]
    assert split(Rule.QKV, whole, arch, 2, 1).tolist() == [2, 3, 11, 21]
    assert split(Rule.QKV, whole, arch, 4, 2).tolist() == [2, 3]


def test_each_rank_holds_its_rows_of_gate_then_of_up(make_arch):
    whole = [numbered(4, 0), numbered(4, 10)]
    assert split(Rule.GATE_UP, whole, make_arch(), 2, 1).flatten().tolist() == [2, 3, 12, 13]


def test_an_odd_vocabulary_is_padded_with_zeros_on_the_last_rank(make_arch):
    shard = split(Rule.VOCAB, [numbered(5, 1)], make_arch(vocab_size=5), 4, 2)
    assert shard.flatten().tolist() == [5, 0]
    assert split(Rule.VOCAB, [numbered(5, 1)], make_arch(vocab_size=5), 4, 3).flatten().tolist() == [0, 0]


def test_row_parallel_cuts_input_features(make_arch):
    whole = torch.arange(8.0).reshape(2, 4)
    assert split(Rule.ROW, [whole], make_arch(), 2, 1).tolist() == [[2, 3], [6, 7]]


@pytest.mark.parametrize(
    ("rule", "shapes"), [(Rule.COLUMN, [(3, 2)]), (Rule.ROW, [(2, 3)]), (Rule.GATE_UP, [(3, 2), (3, 2)])]
)
def test_a_dimension_that_ranks_do_not_divide_is_refused(make_arch, rule: Rule, shapes: list[tuple[int, int]]):
    with pytest.raises(MappingError, match=r"\((3, 2|2, 3)\) is not divisible by 2 ranks"):
        split(rule, [torch.zeros(shape) for shape in shapes], make_arch(), 2, 0)
