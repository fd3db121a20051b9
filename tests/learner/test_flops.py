"""The count of operations beside the one that torch makes of a real model."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_async_rlhf.devices import known_peak
from megatron_async_rlhf.models.architecture import Architecture
from megatron_async_rlhf.models.flops import forward_flops

ARCH = Architecture(
    vocab_size=50, layers=3, hidden_size=32, ffn_size=48, heads=4, kv_heads=2, head_dim=8, context_length=64,
    rope_theta=1e4, norm_eps=1e-5, tie_embeddings=False,
)  # fmt: skip


def test_forward_is_what_torch_counts_but_for_the_causal_half():
    model = LlamaForCausalLM(LlamaConfig(**ARCH.to_hf(eos_token_id=1), attn_implementation="eager"))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(2, 20, dtype=torch.long))
    acausal_half = 2 * ARCH.layers * ARCH.heads * ARCH.head_dim * 2 * 20**2
    # torch also counts the rotary angles: a product for each position and pair of a head's numbers, once or by row.
    angles = 2 * 20 * ARCH.head_dim // 2
    surplus = counter.get_total_flops() - forward_flops(ARCH, [20, 20]) - acausal_half
    assert surplus in (0, angles, 2 * angles)


def test_only_some_tokens_need_the_output_matrix():
    saved = forward_flops(ARCH, [20, 7]) - forward_flops(ARCH, [20, 7], outputs=5)
    assert saved == 2 * (27 - 5) * ARCH.vocab_size * ARCH.hidden_size


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H200", "bf16", 989e12),
        ("NVIDIA H100 80GB HBM3", "fp8", 1979e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA A100-SXM4-80GB", "fp8", None),
        ("AMD EPYC", "fp32", None),
    ],
)
def test_known_devices(name: str, precision: str, peak: float | None):
    assert known_peak(name, precision) == peak
