"""Which modules make up a layer on which device, and what is fused there.

Transformer Engine: on a GPU where it is installed; also runs in FP8, with norms fused into the linear layers behind them
local:              everywhere else: Megatron's own linear layers, our norm, attention and activation
"""

import importlib.util
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import MegatronModule, ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_async_rlhf.learner.megatron.layers.attention import PackedAttention
from megatron_async_rlhf.learner.megatron.layers.rms_norm import RMSNorm, SeparateRMSNorm
from megatron_async_rlhf.learner.megatron.layers.swiglu import SwiGLU
from megatron_async_rlhf.models.architecture import Architecture


def stage_spec(arch: Architecture, layers: int, device: torch.device) -> TransformerBlockSubmodules:
    """So many of Megatron's transformer layers and the norm behind the last stage's."""
    if has_transformer_engine(device):
        from megatron.core.extensions.transformer_engine import TENorm  # cannot be imported without the library

        layer: ModuleSpec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=arch.qk_norm)
        return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=TENorm)
    layer = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=arch.qk_norm)
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    layer.submodules.mlp.submodules.activation_func = SwiGLU
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    if arch.qk_norm:
        attention.q_layernorm = attention.k_layernorm = SeparateRMSNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=SeparateRMSNorm)


def device_keys(device: torch.device) -> dict[str, Any]:
    """What Megatron's `TransformerConfig` needs to know about the device."""
    on_gpu, fused = device.type == "cuda", has_transformer_engine(device)
    return {
        "use_cpu_initialization": not on_gpu,
        "use_te_activation_func": not fused,  # as a module of its own: `SwiGLU` takes its place
        "bias_activation_fusion": fused,  # SwiGLU in one kernel
        "bias_dropout_fusion": on_gpu,  # the residual sum
        "apply_rope_fusion": fused or not on_gpu,  # on a CPU `rotary` takes its place
        "gradient_accumulation_fusion": on_gpu and has_apex_accumulation(),  # see also `fuse_gradient_accumulation`
    }


def fuse_gradient_accumulation(model: MegatronModule, device: torch.device) -> None:
    """Let Transformer Engine's layers add a weight's gradient to the buffer in the product that computes it.

    Megatron has a key for it, which also asks for NVIDIA apex, because of linear layers of its own that use apex's kernel.
    """
    if has_transformer_engine(device):
        for module in model.modules():
            if hasattr(module, "fuse_wgrad_accumulation"):
                module.fuse_wgrad_accumulation = True


def has_transformer_engine(device: torch.device) -> bool:
    """Whether layers on this device come from Transformer Engine."""
    return device.type == "cuda" and importlib.util.find_spec("transformer_engine") is not None


def has_apex_accumulation() -> bool:
    """Whether NVIDIA apex is here with the kernel that adds a weight's gradient straight into the buffer."""
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def fused_parts(device: torch.device) -> dict[str, str]:
    """What a run on this device uses, in words, for the log and for `async-rlhf doctor`."""
    from megatron.core.optimizer import Adam

    fused = has_transformer_engine(device)
    accumulates = "Transformer Engine" if fused else "torch"
    if not fused and device.type == "cuda" and has_apex_accumulation():
        accumulates = "apex"
    return {
        "layers": "Transformer Engine" if fused else "local (Megatron-core and torch)",
        "Adam": f"{Adam.__module__.partition('.')[0]} {Adam.__name__}",
        "gradient accumulation": accumulates,
    }
