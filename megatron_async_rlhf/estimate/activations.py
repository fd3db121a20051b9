"""What Megatron's layers keep from the forward pass for the backward pass, counted from their code.

Every number here is checked against the tensors that autograd really saves (tests/estimate/test_activations.py).
Legend, per token of a micro-batch on one rank: H hidden size, or its share with sequence parallelism; A attention
heads, K key-value heads, F feed-forward size, all of this rank; D size of a head.
"""

from dataclasses import dataclass

from megatron_async_rlhf.config.sections import LearnerSection
from megatron_async_rlhf.formats.tensor_spec import ITEM_BYTES
from megatron_async_rlhf.models.architecture import Architecture

FLOAT32 = 4


@dataclass(frozen=True, kw_only=True)
class LayerShare:
    """One rank's part of a layer, and bytes per number."""

    hidden: int  # the whole hidden size
    hidden_kept: int  # of a token between layers, on average over a row
    heads: int
    kv_heads: int
    head_dim: int
    qkv: int  # numbers of the one tensor that query, key and value are cut from
    ffn: int
    item: int
    qk_norm: bool
    fp8: bool
    context_parallel: int
    longest: int  # positions of the longest sequence

    @classmethod
    def of(cls, arch: Architecture, learner: LearnerSection) -> "LayerShare":
        tensor = learner.tensor_parallel
        return cls(
            hidden=arch.hidden_size,
            hidden_kept=arch.hidden_size // (tensor if learner.sequence_parallel else 1),
            heads=arch.heads // tensor,
            kv_heads=max(1, arch.kv_heads // tensor),
            head_dim=arch.head_dim,
            # With fewer key-value heads than ranks, every rank gathers all of it to find its own.
            qkv=arch.head_dim * (arch.heads + 2 * arch.kv_heads) // (tensor if tensor <= arch.kv_heads else 1),
            ffn=arch.ffn_size // tensor,
            item=ITEM_BYTES[learner.weights_dtype],
            qk_norm=arch.qk_norm,
            fp8=learner.fp8 is not None,
            context_parallel=learner.context_parallel,
            longest=arch.context_length,
        )

    @property
    def query(self) -> int:
        return self.heads * self.head_dim

    @property
    def key(self) -> int:
        return self.kv_heads * self.head_dim


def norm_bytes(share: LayerShare, numbers: int, vectors: int = 1) -> int:
    """An RMSNorm of `numbers` in `vectors`: 1/rms of each vector and the normalised numbers, in float32.

    A bf16 input goes to torch's own norm, which keeps a float32 copy of it too.
    """
    copies = 1 if share.item == FLOAT32 else 2
    return FLOAT32 * (copies * numbers + vectors)


def attention_kernel_bytes(share: LayerShare) -> int:
    """What the attention kernel keeps beside its inputs: its output, and the log of each row's sum in float32.

    Scores are never kept.
    """
    return share.item * share.query + FLOAT32 * share.heads


def layer_bytes(share: LayerShare, recompute: str) -> int:
    """Bytes per token that one layer keeps until its backward pass."""
    if recompute == "full":
        return share.item * share.hidden_kept  # its input; all else is computed again
    kept = _fused_layer_bytes(share) if share.fp8 else _layer_bytes(share)
    return kept - (attention_kernel_bytes(share) if recompute == "selective" else 0)


def _layer_bytes(share: LayerShare) -> int:
    """Megatron's layers on torch alone (`learner/megatron/layers/spec.py`), an upper bound for Transformer Engine's in bf16."""
    e, h = share.item, share.hidden_kept
    norms = 2 * (norm_bytes(share, h) + e * h)  # each with its output, which the matrix after it keeps
    # Cosines and sines of each position, for queries and for keys; rotated queries and keys are new tensors, values
    # are a view that keeps all of query, key and value alive.
    rotary = e * 4 * share.head_dim
    qkv = e * (share.qkv + share.query + share.key)
    if share.context_parallel > 1:
        # Keys and values of all ranks instead of the own ones, and a mask for each of a sequence's two parts that
        # together look at 2 C + 1 parts of longest / (2 C).
        seen = (2 * share.context_parallel + 1) * share.longest // (4 * share.context_parallel)
        qkv = e * (share.query + 2 * share.key * share.context_parallel + seen)
    if share.qk_norm:
        qkv += norm_bytes(share, share.query, share.heads) + norm_bytes(share, share.key, share.kv_heads)
    projection = e * share.query  # sequences put back into one row: the input of the output projection
    mlp = e * 3 * share.ffn  # gate and up, and silu(gate) x up
    return norms + rotary + qkv + attention_kernel_bytes(share) + projection + mlp


def _fused_layer_bytes(share: LayerShare) -> int:
    """Transformer Engine's layers with FP8: norms keep their inputs, matrices theirs in one byte.

    Read off its source; not yet compared with a GPU.
    """
    e, h = share.item, share.hidden_kept
    norms = 2 * (e * h + FLOAT32 + h)  # input, 1/rms, output in FP8
    qkv = e * (share.qkv + share.query + share.key + 4 * share.head_dim)
    projection = share.query
    mlp = e * 2 * share.ffn + share.ffn
    return norms + qkv + attention_kernel_bytes(share) + projection + mlp


def backward_bytes(share: LayerShare, tokens: int) -> int:
    """Most that the backward pass of a layer of `tokens` has at once beyond what the layer kept.

    Reached in one of three places; the residual path's gradient goes around them all.
    """
    f, h, t = share.ffn, share.hidden, tokens
    candidates = (
        3 * f * t,  # at silu(gate) x up: its gradient (the product itself is gone), those of gate and up, silu(gate)
        f * t + f * h,  # at the second matrix: gradients of its input and of itself
        2 * f * h + (h - f) * t,  # at the first: of itself and its input; of the 3 F kept and 3 F above, 2 F are left
    )
    return share.item * (max(candidates) + share.hidden_kept * t)


def head_bytes(share: LayerShare) -> int:
    """The final norm of the last stage, per token, and the hidden states that the log-probabilities keep."""
    return norm_bytes(share, share.hidden_kept) + share.item * share.hidden


def chunks_in_flight(stage: int, stages: int, virtual_stages: int, micro_batches: int) -> int:
    """How many micro-batches a stage has between their forward and backward passes, each in one chunk of its layers.

    Megatron's 1F1B schedules: the warm-up passes and one more (`get_pp_rank_microbatches`).
    """
    if virtual_stages == 1:
        return min(stages - stage, micro_batches)
    warmup = 2 * (stages - stage - 1) + (virtual_stages - 1) * stages
    return min(warmup + 1, micro_batches * virtual_stages)
