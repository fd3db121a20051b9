"""Builds policies, value models and reward models as Megatron's `GPTModel`s for this rank's stages and shard."""

import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig

from megatron_async_rlhf.config.sections import LearnerSection, Recompute
from megatron_async_rlhf.formats.stored import DTYPES
from megatron_async_rlhf.learner.megatron.layers.fp8 import fp8_keys
from megatron_async_rlhf.learner.megatron.layers.output import defer_output
from megatron_async_rlhf.learner.megatron.layers.score_head import ScoreHead
from megatron_async_rlhf.learner.megatron.layers.spec import device_keys, fuse_gradient_accumulation, stage_spec
from megatron_async_rlhf.learner.megatron.parallel import Placement
from megatron_async_rlhf.models.architecture import Architecture, RopeScaling

# What backward computes again instead of keeping it: attention, or all inside a layer.
_RECOMPUTE: dict[Recompute, dict] = {
    "none": {},
    "selective": {"recompute_granularity": "selective"},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def transformer_config(arch: Architecture, placement: Placement, learner: LearnerSection) -> TransformerConfig:
    """Megatron's description of a dense decoder without dropout."""
    dtype = DTYPES[learner.weights_dtype]
    interleaved = placement.virtual_stages > 1
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
        virtual_pipeline_model_parallel_size=placement.virtual_stages if interleaved else None,
        context_parallel_size=learner.context_parallel,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=learner.precision == "bf16",
        # Micro-batches are cut by tokens, so their shapes differ. Between interleaved stages they must not: there,
        # Megatron exchanges shapes in an order that two stages, each the other's next and previous, mix up.
        variable_seq_lengths=not interleaved,
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        batch_p2p_sync=False,
        moe_token_dispatcher_type="alltoall",  # no experts here, but megatron checks it against variable lengths
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
        persist_layer_norm=False,
        **_RECOMPUTE[learner.recompute],
        **device_keys(placement.device),
        **(fp8_keys(learner.fp8) if learner.fp8 else {}),
    )


def padded_vocab_size(vocab_size: int, tensor_parallel: int) -> int:
    """Rows of the embedding so that every tensor-parallel rank holds the same number."""
    return -(-vocab_size // tensor_parallel) * tensor_parallel


def build_model(arch: Architecture, placement: Placement, learner: LearnerSection) -> list[GPTModel]:
    """This rank's chunks of the model, one per virtual stage, on its device. Their weights are yet to be read.

    The last stage returns hidden states, [B, T, H]: see `output`; with a score head, which begins at zero, float32 numbers,
    [B, T, 1].
    """
    config = transformer_config(arch, placement, learner)
    return [_build_chunk(arch, placement, config, number) for number in range(placement.virtual_stages)]


def _build_chunk(arch: Architecture, placement: Placement, config: TransformerConfig, number: int) -> GPTModel:
    layers = arch.layers // (placement.pipeline_parallel * placement.virtual_stages)
    model = GPTModel(
        config=config,
        transformer_layer_spec=stage_spec(arch, layers, placement.device),
        vocab_size=padded_vocab_size(arch.vocab_size, placement.tensor_parallel),
        max_sequence_length=arch.context_length,
        pre_process=placement.has_embedding and number == 0,
        post_process=placement.is_last_stage and number == placement.virtual_stages - 1,
        share_embeddings_and_output_weights=arch.tie_embeddings,
        position_embedding_type="rope",
        rotary_base=arch.rope_theta,
        parallel_output=True,
        vp_stage=number if placement.virtual_stages > 1 else None,
    )
    if arch.has_score_head and model.post_process:
        model.output_layer = ScoreHead(config)
    else:
        defer_output(model)
    fuse_gradient_accumulation(model, placement.device)
    model = model.to(placement.device)
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
