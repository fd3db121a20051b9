"""The transfer plan over random layouts, checked on plain integers and against independent counting."""

from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.models.architecture import Architecture
from megatron_async_rlhf.models.hf_mapping import elements_held, hf_shapes
from megatron_async_rlhf.models.layout import (
    VLLM_VOCAB_MULTIPLE,
    LearnerLayout,
    generator_pieces,
    learner_pieces,
    matrix_shape,
    parameter_shapes,
)
from megatron_async_rlhf.weights.plan import TransferPlan, plan_transfer

STAGING = 32 * 1024


@st.composite
def cases(draw: st.DrawFn) -> tuple[Architecture, LearnerLayout, int]:
    """Odd vocabularies, grouped and scarce key-value heads, every family, layouts up to 8 x 8 x 3."""
    tensor = draw(st.sampled_from([1, 2, 3, 4, 8]))
    generator = draw(st.sampled_from([1, 2, 4, 8]))
    stages = draw(st.sampled_from([1, 2, 3, 4, 8]))
    virtual = draw(st.sampled_from([1, 1, 2])) if stages > 1 else 1
    both = _lcm(tensor, generator)
    kv_heads = draw(st.sampled_from([1, 2, 3, 4, 6, 8]).filter(lambda kv: _fits(kv, tensor) and _fits(kv, generator)))
    heads = _lcm(kv_heads, both) * draw(st.integers(1, 2))
    head_dim = 2 * tensor  # Megatron divides query, key and value rows together, also inside a key-value group
    family = draw(st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]))
    arch = Architecture(
        family=family,
        vocab_size=draw(st.integers(1, 200)),
        layers=stages * virtual * draw(st.integers(1, 2)),
        hidden_size=draw(st.integers(1, 9)),
        ffn_size=both * draw(st.integers(1, 3)),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        context_length=16,
        rope_theta=10000.0,
        norm_eps=1e-5,
        tie_embeddings=draw(st.booleans()),
    )
    layout = LearnerLayout(
        tensor_parallel=tensor,
        pipeline_parallel=stages,
        data_parallel=draw(st.integers(1, 3)),
        virtual_stages=virtual,
    )
    return arch, layout, generator


def _lcm(a: int, b: int) -> int:
    return next(n for n in range(a, a * b + 1, a) if not n % b)


def _fits(kv_heads: int, ranks: int) -> bool:
    return not (kv_heads % ranks and ranks % kv_heads)


def make_plan(case: tuple[Architecture, LearnerLayout, int], staging_bytes: int = STAGING) -> TransferPlan:
    arch, layout, generator = case
    return plan_transfer(arch, layout, generator, dtype="float32", staging_bytes=staging_bytes)


def cells(tensor: str, rows: tuple[int, int], cols: tuple[int, int]):
    return ((tensor, row, col) for row in range(*rows) for col in range(*cols))


@settings(deadline=None, max_examples=60)
@given(cases())
def test_every_receiver_gets_every_element_it_holds_exactly_once(case):
    arch, _, generator = case
    plan = make_plan(case)
    for rank in range(generator):
        expected = Counter(
            cell for p in generator_pieces(arch, generator, rank) for cell in cells(p.tensor, p.rows, p.cols)
        )
        got = Counter(cell for s in plan.received_by(rank) for cell in cells(s.tensor, s.rows, s.cols))
        assert got == expected
        assert set(expected.values()) == {1}
    # Counted by hand from the model's shape, without pieces.
    assert plan.num_bytes == 4 * elements_held(arch, generator)


@settings(deadline=None, max_examples=60)
@given(cases())
def test_a_slice_lies_where_both_sides_hold_it(case):
    """Element by element: (parameter, row, column) on each side is the element the slice says it is."""
    arch, layout, generator = case
    held = [element_map(learner_pieces(arch, layout, rank)) for rank in range(layout.ranks)]
    wanted = [element_map(generator_pieces(arch, generator, rank)) for rank in range(generator)]
    for (sender, receiver), messages in make_plan(case).streams.items():
        for s in (s for message in messages for s in message):
            for i, j in ((0, 0), (s.height - 1, s.width - 1)):
                element = (s.tensor, s.rows[0] + i, s.cols[0] + j)
                assert held[sender][s.source, s.source_row + i, s.source_col + j] == element
                assert wanted[receiver][s.target, s.target_row + i, s.target_col + j] == element


def element_map(pieces) -> dict:
    return {
        (p.parameter, p.row + i, p.col + j): (p.tensor, p.rows[0] + i, p.cols[0] + j)
        for p in pieces
        for i in range(p.rows[1] - p.rows[0])
        for j in range(p.cols[1] - p.cols[0])
    }


@settings(deadline=None, max_examples=60)
@given(cases())
def test_the_learners_ranks_hold_the_whole_model_once_per_replica(case):
    arch, layout, _ = case
    copies = Counter()
    for rank in range(layout.ranks):
        pieces = learner_pieces(arch, layout, rank)
        places = Counter(
            (p.parameter, p.row + i, p.col) for p in pieces for i in range(p.rows[1] - p.rows[0])
        )  # fmt: skip
        assert set(places.values()) <= {1}, "two pieces on top of each other"
        copies.update(cell for p in pieces for cell in cells(p.tensor, p.rows, p.cols))
    shapes = {name: matrix_shape(shape) for name, shape in hf_shapes(arch).items()}
    assert set(copies) == {cell for name, (r, c) in shapes.items() for cell in cells(name, (0, r), (0, c))}
    for (tensor, _, _), count in copies.items():
        is_vector = shapes[tensor][1] == 1 and "bias" not in tensor and arch.hidden_size > 1
        expected = layout.data_parallel * (layout.tensor_parallel if is_vector else 1)
        if arch.tie_embeddings and "embed" in tensor and layout.pipeline_parallel > 1:
            expected *= 2
        if shapes[tensor][1] > 1 or is_vector:
            assert count == expected, tensor


@settings(deadline=None, max_examples=60)
@given(cases())
def test_no_rank_packs_or_receives_more_than_one_staging_buffer_in_a_round(case):
    plan = make_plan(case)
    rounds = [r for sender in range(plan.senders) for r in plan.outgoing(sender)]
    arriving = [r for receiver in range(plan.receivers) for r in plan.incoming(receiver)]
    assert all(4 * sum(s.size for _, m in peers for s in m) <= STAGING for peers in (*rounds, *arriving))
    moved = sum(s.size for peers in arriving for _, m in peers for s in m)
    assert 4 * moved == plan.num_bytes


@settings(deadline=None, max_examples=30)
@given(cases())
def test_the_plan_is_the_same_on_every_rank_and_tells_layouts_apart(case):
    arch, layout, generator = case
    plan = make_plan(case)
    assert plan == make_plan(case)
    assert plan.fingerprint == make_plan(case).fingerprint
    assert plan.fingerprint != make_plan(case, staging_bytes=2 * STAGING).fingerprint or plan == make_plan(
        case, 2 * STAGING
    )
    more = LearnerLayout(
        tensor_parallel=layout.tensor_parallel,
        pipeline_parallel=layout.pipeline_parallel,
        data_parallel=layout.data_parallel + 1,
        virtual_stages=layout.virtual_stages,
    )
    assert plan.fingerprint != make_plan((arch, more, generator)).fingerprint


LLAMA_8B = Architecture(
    vocab_size=128256, layers=32, hidden_size=4096, ffn_size=14336, heads=32, kv_heads=8, head_dim=128,
    context_length=8192, rope_theta=500000.0, norm_eps=1e-5, tie_embeddings=False,
)  # fmt: skip


@pytest.mark.parametrize("data_parallel", [1, 2, 4])
def test_data_parallel_replicas_share_the_sending_evenly(data_parallel: int):
    layout = LearnerLayout(tensor_parallel=4, pipeline_parallel=2, data_parallel=data_parallel)
    plan = plan_transfer(LLAMA_8B, layout, 4, dtype="bfloat16", staging_bytes=64 * 2**20)
    load: dict[tuple, list[int]] = defaultdict(list)
    for sender in range(layout.ranks):
        load[layout.place(sender)].append(sum(s.size for s in plan.sent_by(sender)))
    assert len(load) == 8
    for replicas in load.values():
        assert len(replicas) == data_parallel
        assert max(replicas) <= 1.001 * min(replicas)
    stage = [sum(load[t, s]) for s in range(2) for t in range(4)]
    for loads in (stage[:4], stage[4:]):  # norms are held by all tensor ranks: whoever has sent least sends them
        assert max(loads) <= 1.001 * min(loads)
    assert plan.num_bytes == 2 * (LLAMA_8B.num_parameters + 3 * 65 * 4096)  # every worker has all norms


def test_a_row_that_fits_no_message_is_refused():
    arch = LLAMA_8B
    layout = LearnerLayout(tensor_parallel=1, pipeline_parallel=1)
    with pytest.raises(ConfigError, match=r"weights.staging_mib = 0.0078.*embed_tokens.*raise it"):
        plan_transfer(arch, layout, 1, dtype="float32", staging_bytes=8 * 1024)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_vllm_parameters_have_their_known_shapes(ranks: int):
    """Shapes of Llama-3.1-8B on a vLLM worker, written down from vLLM's own layers."""
    shapes = parameter_shapes(generator_pieces(LLAMA_8B, ranks, ranks - 1))
    assert shapes["model.layers.31.self_attn.qkv_proj.weight"] == ((32 + 8 + 8) * 128 // ranks, 4096)
    assert shapes["model.layers.0.mlp.gate_up_proj.weight"] == (2 * 14336 // ranks, 4096)
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (4096, 14336 // ranks)
    assert shapes["model.layers.0.self_attn.o_proj.weight"] == (4096, 4096 // ranks)
    assert shapes["model.embed_tokens.weight"] == (128256 // ranks, 4096)
    assert shapes["lm_head.weight"] == (128256 // ranks, 4096)
    assert shapes["model.norm.weight"] == (4096, 1)


def test_vllm_repeats_scarce_key_value_heads_and_pads_the_vocabulary(make_arch):
    arch = make_arch(heads=8, kv_heads=2, head_dim=2, vocab_size=VLLM_VOCAB_MULTIPLE + 1, layers=1)
    pieces = {rank: {p.tensor: p for p in generator_pieces(arch, 4, rank)} for rank in range(4)}
    keys = [pieces[rank]["model.layers.0.self_attn.k_proj.weight"].rows for rank in range(4)]
    assert keys == [(0, 2), (0, 2), (2, 4), (2, 4)]
    rows = [pieces[rank].get("model.embed_tokens.weight") for rank in range(4)]
    assert [p and p.rows for p in rows] == [(0, 32), (32, 64), (64, 65), None]
