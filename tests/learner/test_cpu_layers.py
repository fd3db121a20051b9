"""The CPU's own parts of a layer beside plain formulas, values and gradients, in float64."""

from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from torch.testing import assert_close

from megatron_async_rlhf.learner.megatron.layers.attention import PackedAttention
from megatron_async_rlhf.learner.megatron.layers.packed_row import PackedRow
from megatron_async_rlhf.learner.megatron.layers.rms_norm import RMSNorm
from megatron_async_rlhf.learner.megatron.layers.rotary import rotate_packed
from megatron_async_rlhf.learner.megatron.layers.swiglu import SwiGLU

# Neighbours of one length are computed together; others alone.
LENGTHS = [7, 4, 4, 4, 1, 1, 3]
ENDS = [0, *accumulate(LENGTHS)]
TOKENS = sum(LENGTHS)
PLACES = torch.cat([torch.arange(length) for length in LENGTHS])
# The same row with parts that continue from others: the second and fourth from the first, the last from the third.
BEFORE = [None, (0, 7), None, (0, 7), None, None, (11, 15)]


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def assert_same(ours, theirs, inputs: list[torch.Tensor]) -> None:
    """Of two functions of `inputs`: values, and gradients against a random direction."""
    torch.manual_seed(0)
    results = []
    for function in (ours, theirs):
        value = function(*inputs)
        direction = torch.randn(value.shape, dtype=value.dtype, generator=torch.Generator().manual_seed(1))
        results.append([value, *torch.autograd.grad(value, inputs, direction)])
    for our_tensor, their_tensor in zip(*results, strict=True):
        assert_close(our_tensor, their_tensor)


@pytest.mark.parametrize("shape", [(TOKENS, 1, 6), (TOKENS, 1, 3, 8)])
def test_norm(shape: tuple[int, ...]):
    """As between layers, and as of the heads of queries and keys."""
    norm = RMSNorm(SimpleNamespace(sequence_parallel=False, params_dtype=torch.float64), shape[-1], eps=0.1)
    weight = draw(shape[-1])

    def ours(x, weight):
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    assert_same(ours, lambda x, weight: F.rms_norm(x, shape[-1:], weight, 0.1), [draw(*shape), weight])


def test_norm_of_bfloat16_sums_in_float32():
    norm = RMSNorm(SimpleNamespace(sequence_parallel=False, params_dtype=torch.bfloat16), 512)
    x = torch.randn(3, 512, dtype=torch.bfloat16)
    assert_close(norm(x), F.rms_norm(x.float(), (512,), eps=1e-5).bfloat16(), rtol=1e-2, atol=1e-2)


def test_gate():
    assert_same(SwiGLU(None), lambda x: F.silu(x[..., :5]) * x[..., 5:], [draw(TOKENS, 1, 10)])


def test_rotation_restarts_with_each_sequence():
    angles = torch.rand(max(LENGTHS), 1, 1, 4, dtype=torch.float64).repeat(1, 1, 1, 2) * 6

    def theirs(t):
        return torch.cat([_apply_rotary_pos_emb_bshd(part, angles[: len(part), 0]) for part in t.split(LENGTHS)])

    assert_same(lambda t: rotate_packed(t, PLACES, angles), theirs, [draw(TOKENS, 3, 8)])


@pytest.mark.parametrize("before", [[], BEFORE], ids=["whole", "shared"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_stays_within_a_sequence_and_behind(kv_heads: int, before: list[tuple[int, int] | None]):
    attention = PackedAttention(
        config=None, layer_number=1, attn_mask_type=None, attention_type="self", softmax_scale=0.3
    )
    packed = PackedRow.of(ENDS, before)
    owner = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    position = torch.arange(TOKENS)
    seen = (owner[:, None] == owner[None]) & (position[:, None] >= position[None])
    for part, span in enumerate(before):
        if span:
            seen[ENDS[part] : ENDS[part + 1], slice(*span)] = True

    def theirs(query, key, value):
        key, value = (x.repeat_interleave(4 // kv_heads, dim=1) for x in (key, value))
        scores = torch.einsum("qad,kad->aqk", query, key) * 0.3
        return torch.einsum("aqk,kad->qad", scores.masked_fill(~seen, -torch.inf).softmax(-1), value)

    def ours(query, key, value):
        return attention(query, key, value, packed_seq_params=packed)

    assert_same(ours, theirs, [draw(TOKENS, heads, 8) for heads in (4, kv_heads, kv_heads)])
