"""The modules that Transformer Engine's layers consist of, with its names and states, on a CPU.

Fused: a norm's weight is a parameter of the linear layer behind it. Every module with numbers, and the attention, has an
extra state. Their arithmetic is that of our own layers.
"""

import io

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_async_rlhf.learner.megatron import model
from megatron_async_rlhf.learner.megatron.layers.attention import PackedAttention
from megatron_async_rlhf.learner.megatron.layers.rms_norm import RMSNorm
from megatron_async_rlhf.learner.megatron.layers.swiglu import SwiGLU


class ScalingState:
    """Transformer Engine's `get_extra_state` and `set_extra_state`: bytes of a pickle in a tensor, or nothing."""

    loads = 0  # how often the state that stands for a scale was loaded

    def get_extra_state(self) -> torch.Tensor:
        file = io.BytesIO()
        torch.save({"scale": torch.full((3,), 0.5)}, file)
        return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor | None) -> None:
        if state is None:
            return
        if not isinstance(state, torch.Tensor):
            raise RuntimeError("Unsupported checkpoint format.")
        if state.numel():
            assert torch.load(io.BytesIO(state.numpy().tobytes()))["scale"].tolist() == [0.5] * 3
            ScalingState.loads += 1


class Norm(ScalingState, RMSNorm): ...


class ColumnLinear(ScalingState, ColumnParallelLinear): ...


class RowLinear(ScalingState, RowParallelLinear): ...


class NormColumnLinear(ColumnLinear):
    """`LayerNormLinear`."""

    def __init__(self, input_size: int, output_size: int, *, config, **keys) -> None:
        super().__init__(input_size, output_size, config=config, **keys)
        norm = RMSNorm(config, input_size, eps=config.layernorm_epsilon)
        self.layer_norm_weight, self._norm = norm.weight, [norm]  # in a list: no module of ours

    def forward(self, x: torch.Tensor, *arguments, **keys):
        return super().forward(self._norm[0](x), *arguments, **keys)


class Attention(ScalingState, PackedAttention):
    """Megatron leaves its state out of checkpoints, and it does not miss it."""

    def __init__(self, *arguments, **keys) -> None:
        super().__init__(*arguments, **keys)
        self.register_load_state_dict_post_hook(self._forget_missing)

    @staticmethod
    def _forget_missing(module, incompatible) -> None:
        incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if "core_attention" not in key]

    def sharded_state_dict(self, *arguments, **keys) -> dict:
        return {}


def engine_spec(arch, layers: int, device: torch.device) -> TransformerBlockSubmodules:
    """In the place of `layers.stage_spec`."""
    layer = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=arch.qk_norm)
    parts, attention, mlp = (
        layer.submodules,
        layer.submodules.self_attention.submodules,
        layer.submodules.mlp.submodules,
    )
    parts.input_layernorm = parts.pre_mlp_layernorm = IdentityOp
    parts.sharded_state_dict_keys_map = {}
    attention.linear_qkv = mlp.linear_fc1 = NormColumnLinear
    attention.linear_proj = mlp.linear_fc2 = RowLinear
    attention.core_attention, mlp.activation_func = Attention, SwiGLU
    if arch.qk_norm:
        attention.q_layernorm = attention.k_layernorm = Norm
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=Norm)


def use_engine_layers() -> None:
    """Build models of these from now on."""
    model.stage_spec = engine_spec
