"""Floating-point operations that a model needs. Plain numbers: no torch here."""

from collections.abc import Sequence

from megatron_async_rlhf.config.algorithm_keys import AlgorithmKeys
from megatron_async_rlhf.models.architecture import Architecture


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
    skipped = 0 if outputs is None else tokens - outputs
    # A token sees the half of its sequence on average.
    whole = sum(length * token_flops(arch, length / 2) for length in lengths)
    return whole - skipped * output_flops(arch)


def passes_before_updates(algorithm: AlgorithmKeys, updates: int) -> int:
    """Forward passes of the policy's shape over a rollout before the first of its `updates`: reference, proximal policy."""
    return algorithm.has_reference + algorithm.scores_policy_first(updates)


def rollout_flops(
    arch: Architecture, algorithm: AlgorithmKeys, lengths: Sequence[int], outputs: int, *, updates: int, epochs: int
) -> float:
    """Of a rollout whose sequences are trained `epochs` times each; a backward pass counts as two forward passes.

    The value model is trained as often and computes its values once before; it has no output matrix.
    """
    training = 3 * epochs
    policy = (training + passes_before_updates(algorithm, updates)) * forward_flops(arch, lengths, outputs)
    return policy + (training + 1) * forward_flops(arch, lengths, 0) * algorithm.has_value_model


def token_flops(arch: Architecture, context: float) -> float:
    """Of the forward pass of one token that sees `context` tokens."""
    attention = arch.hidden_size * arch.head_dim * (2 * arch.heads + 2 * arch.kv_heads)
    layer = attention + 3 * arch.hidden_size * arch.ffn_size
    return 2.0 * arch.layers * (layer + 2 * arch.heads * arch.head_dim * context) + output_flops(arch)


def output_flops(arch: Architecture) -> float:
    """Of the logits of one token, or of its score."""
    return 2.0 * (1 if arch.has_score_head else arch.vocab_size) * arch.hidden_size
