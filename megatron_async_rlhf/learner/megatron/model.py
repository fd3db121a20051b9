"""Builds the policy (and its reference copy) as Megatron's `GPTModel` for this rank's stage and shard."""

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_async_rlhf.config.architecture import Architecture, RopeScaling
from megatron_async_rlhf.config.sections import Recompute
from megatron_async_rlhf.learner.megatron.attention import PackedAttention
from megatron_async_rlhf.learner.megatron.output import defer_output
from megatron_async_rlhf.learner.megatron.parallel import Placement
from megatron_async_rlhf.learner.megatron.rms_norm import RMSNorm
from megatron_async_rlhf.learner.megatron.swiglu import SwiGLU

# What backward computes again instead of keeping it: attention scores, or all inside a layer.
_RECOMPUTE: dict[Recompute, dict] = {
    "none": {},
    "selective": {"recompute_granularity": "selective"},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def transformer_config(arch: Architecture, placement: Placement, recompute: Recompute) -> TransformerConfig:
    """Megatron's description of a dense decoder in float32 without dropout."""
    return TransformerConfig(
        num_layers=arch.layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_size,
        num_attention_heads=arch.heads,
        num_query_groups=arch.kv_heads,
        kv_channels=arch.head_dim,
        tensor_model_parallel_size=placement.tensor_parallel,
        sequence_parallel=placement.sequence_parallel,
        pipeline_model_parallel_size=placement.pipeline_parallel,
        pipeline_dtype=torch.float32,
        params_dtype=torch.float32,
        variable_seq_lengths=True,  # micro-batches are cut by tokens, so their shapes differ
        moe_token_dispatcher_type="alltoall",  # no experts here, but megatron checks it against the line above
        batch_p2p_sync=False,
        use_cpu_initialization=True,
        init_method_std=arch.init_std,
        normalization="RMSNorm",
        layernorm_epsilon=arch.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=arch.qkv_bias,
        qk_layernorm=arch.qk_norm,  # also has Megatron sum these norms' gradients over the ranks, each with its heads
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=True,  # `rotary` on a CPU
        use_te_activation_func=True,  # `swiglu` on a CPU
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        **_RECOMPUTE[recompute],
    )


def stage_spec(arch: Architecture, placement: Placement) -> TransformerBlockSubmodules:
    """Megatron's layers without Transformer Engine for one pipeline stage, with our attention, norm and activation."""
    layer: ModuleSpec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=arch.qk_norm)
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    layer.submodules.mlp.submodules.activation_func = SwiGLU
    if arch.qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return TransformerBlockSubmodules(
        layer_specs=[layer] * (arch.layers // placement.pipeline_parallel), layer_norm=RMSNorm
    )


def padded_vocab_size(vocab_size: int, tensor_parallel: int) -> int:
    """Rows of the embedding so that every tensor-parallel rank holds the same number."""
    return -(-vocab_size // tensor_parallel) * tensor_parallel


def build_model(arch: Architecture, placement: Placement, seed: int, recompute: Recompute = "none") -> GPTModel:
    """A freshly initialised model; the same seed gives the same weights in every layout that has them whole.

    Its last stage returns hidden states, [B, T, H]: see `output`.
    """
    torch.manual_seed(seed)
    model = GPTModel(
        config=transformer_config(arch, placement, recompute),
        transformer_layer_spec=stage_spec(arch, placement),
        vocab_size=padded_vocab_size(arch.vocab_size, placement.tensor_parallel),
        max_sequence_length=arch.context_length,
        pre_process=placement.is_first_stage,
        post_process=placement.is_last_stage,
        share_embeddings_and_output_weights=arch.tie_embeddings,
        position_embedding_type="rope",
        rotary_base=arch.rope_theta,
        parallel_output=True,
    )
    defer_output(model)
    if arch.rope_scaling is not None:
        scale_rotary_frequencies(model.rotary_pos_emb, arch.rope_scaling)
    return model


def scale_rotary_frequencies(rotary: RotaryEmbedding, scaling: RopeScaling) -> None:
    """Slow the low frequencies down as Llama 3.1 does; before the first forward pass, which caches the angles.

    Megatron's formula is the one of Transformers, but `GPTModel` passes it the factor only and leaves the other
    numbers at those of Llama 3.1.
    """
    rotary.inv_freq = rotary._apply_scaling(
        rotary.inv_freq,
        factor=scaling.factor,
        low_freq_factor=scaling.low_freq_factor,
        high_freq_factor=scaling.high_freq_factor,
        original_max_position_embeddings=scaling.original_max_position_embeddings,
    )
