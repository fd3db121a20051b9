"""Floating-point operations that a model needs, and how fast known devices are. Plain numbers: no torch here."""

from collections.abc import Sequence

from megatron_async_rlhf.config.architecture import Architecture

# Dense TFLOP/s as NVIDIA's data sheets give them, by what the device's name contains and the precision; the first
# match counts.
_PEAK_TFLOPS = [
    ("B200", {"bf16": 2250.0, "fp8": 4500.0}),
    ("H200", {"bf16": 989.0, "fp8": 1979.0}),
    ("H100 PCIe", {"bf16": 756.0, "fp8": 1513.0}),
    ("H100", {"bf16": 989.0, "fp8": 1979.0}),
    ("A100", {"bf16": 312.0}),
]


def forward_flops(arch: Architecture, lengths: Sequence[int], outputs: int | None = None) -> float:
    """Operations of one forward pass over sequences of `lengths` tokens; training takes three times as many.

    The field's count of *model* FLOPs (Narayanan et al. 2021, arXiv 2104.04473; PaLM, arXiv 2204.02311, appendix B): a
    multiplication and an addition per weight and token, embeddings left out because they are looked up, norms and the
    like because they are small; in attention the same per query, key and number of a head, once for scores and once
    for values, of which causal attention needs half:

        forward  = 2 x weights x tokens     + 2 x layers x heads x head_dim x sum(length^2)
        training = 6 x weights x tokens     + 12 x layers x heads x head_dim x sum(length^2) / 2

    What recomputation repeats is not counted: utilisation is about what had to be done.

    Args:
        outputs: tokens whose log-probabilities are computed; only those need the output matrix. Default: all.
    """
    tokens = sum(lengths)
    attention = arch.hidden_size * arch.head_dim * (2 * arch.heads + 2 * arch.kv_heads)
    layer = attention + 3 * arch.hidden_size * arch.ffn_size
    output = arch.vocab_size * arch.hidden_size * (tokens if outputs is None else outputs)
    pairs = sum(length * length for length in lengths)
    return 2.0 * (arch.layers * layer * tokens + output) + 2.0 * arch.layers * arch.heads * arch.head_dim * pairs


def known_peak_tflops(device_name: str, precision: str) -> float | None:
    """Dense TFLOP/s of one device at `precision` (`bf16`, `fp8`); None for any that is not in the table."""
    for name, peaks in _PEAK_TFLOPS:
        if name in device_name:
            return peaks.get(precision)
    return None
