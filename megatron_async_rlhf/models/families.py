"""The model families as data: what each parameter is called in Megatron, vLLM and Hugging Face, and how it is cut.

A new dense family is one more entry of `FAMILIES`; code elsewhere asks the entry and knows no family by name.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal, TypedDict

# A dimension of a Hugging Face tensor: `query` is heads x head size, `key_value` is key-value heads x head size.
Size = Literal["vocabulary", "hidden", "ffn", "query", "key_value", "head", "one"]


class Rule(Enum):
    """How one Megatron parameter is made of Hugging Face tensors and cut over tensor-parallel ranks."""

    REPLICATED = "whole on every rank"
    COLUMN = "rows (output features) divided"
    ROW = "columns (input features) divided"
    VOCAB = "rows divided after padding the vocabulary to a multiple of the ranks"
    QKV = "query, key and value interleaved by key-value group, then rows divided"
    GATE_UP = "each rank holds its rows of gate, then its rows of up"


@dataclass(frozen=True)
class Mapping:
    """One parameter. `{layer}` stands for the layer: counted inside the stage in Megatron, model-wide elsewhere.

    Megatron and vLLM each hold one tensor; `hf` names the tensors it is made of, `shapes` says how large each is.
    """

    megatron: str
    vllm: str
    hf: tuple[str, ...]
    shapes: tuple[tuple[Size, ...], ...]
    rule: Rule


@dataclass(frozen=True)
class Family:
    """A dense decoder family.

    Attributes:
        model_type, hf_class: `model_type` and the one entry of `architectures` in its `config.json`.
        layer: the rows of every layer.
        free_head_size: whether `head_dim` may differ from hidden size / heads; vLLM ignores the key for some families.
        whole_heads: whether Transformers refuses a hidden size that is not a multiple of the heads, whatever `head_dim` is.
        never_null: keys of `config.json` that may be left out, and null in other families, but not here.
        forbidden: keys of `config.json` with which Transformers cannot make a model of the family.
        config_defaults: what Transformers takes for a key that `config.json` leaves out, where families differ.
    """

    model_type: str
    hf_class: str
    layer: tuple[Mapping, ...]
    embedding: Mapping
    final_norm: Mapping
    output: Mapping  # absent from a model with tied embeddings
    score: Mapping  # in place of `output` in a model that gives each token a number
    free_head_size: bool = True
    whole_heads: bool = False
    never_null: tuple[str, ...] = ()
    forbidden: tuple[str, ...] = ()
    config_defaults: dict[str, Any] = field(default_factory=dict)

    @property
    def classifier_class(self) -> str:
        """The one entry of `architectures` of a model with a score head."""
        return self.hf_class.replace("ForCausalLM", "ForSequenceClassification")

    @property
    def qkv_bias(self) -> bool:
        return _QKV_BIAS in self.layer

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normalised per head."""
        return _Q_NORM in self.layer


class _Outer(TypedDict):
    """The fields of a family outside its layers."""

    embedding: Mapping
    final_norm: Mapping
    output: Mapping
    score: Mapping


_INPUT_NORM = Mapping(
    megatron="decoder.layers.{layer}.input_layernorm.weight",
    vllm="model.layers.{layer}.input_layernorm.weight",
    hf=("model.layers.{layer}.input_layernorm.weight",),
    shapes=(("hidden",),),
    rule=Rule.REPLICATED,
)
_QKV = Mapping(
    megatron="decoder.layers.{layer}.self_attention.linear_qkv.weight",
    vllm="model.layers.{layer}.self_attn.qkv_proj.weight",
    hf=(
        "model.layers.{layer}.self_attn.q_proj.weight",
        "model.layers.{layer}.self_attn.k_proj.weight",
        "model.layers.{layer}.self_attn.v_proj.weight",
    ),
    shapes=(("query", "hidden"), ("key_value", "hidden"), ("key_value", "hidden")),
    rule=Rule.QKV,
)
_QKV_BIAS = Mapping(
    megatron="decoder.layers.{layer}.self_attention.linear_qkv.bias",
    vllm="model.layers.{layer}.self_attn.qkv_proj.bias",
    hf=(
        "model.layers.{layer}.self_attn.q_proj.bias",
        "model.layers.{layer}.self_attn.k_proj.bias",
        "model.layers.{layer}.self_attn.v_proj.bias",
    ),
    shapes=(("query",), ("key_value",), ("key_value",)),
    rule=Rule.QKV,
)
_Q_NORM = Mapping(
    megatron="decoder.layers.{layer}.self_attention.q_layernorm.weight",
    vllm="model.layers.{layer}.self_attn.q_norm.weight",
    hf=("model.layers.{layer}.self_attn.q_norm.weight",),
    shapes=(("head",),),
    rule=Rule.REPLICATED,
)
_K_NORM = Mapping(
    megatron="decoder.layers.{layer}.self_attention.k_layernorm.weight",
    vllm="model.layers.{layer}.self_attn.k_norm.weight",
    hf=("model.layers.{layer}.self_attn.k_norm.weight",),
    shapes=(("head",),),
    rule=Rule.REPLICATED,
)
_ATTENTION_OUTPUT = Mapping(
    megatron="decoder.layers.{layer}.self_attention.linear_proj.weight",
    vllm="model.layers.{layer}.self_attn.o_proj.weight",
    hf=("model.layers.{layer}.self_attn.o_proj.weight",),
    shapes=(("hidden", "query"),),
    rule=Rule.ROW,
)
_MLP_NORM = Mapping(
    megatron="decoder.layers.{layer}.pre_mlp_layernorm.weight",
    vllm="model.layers.{layer}.post_attention_layernorm.weight",
    hf=("model.layers.{layer}.post_attention_layernorm.weight",),
    shapes=(("hidden",),),
    rule=Rule.REPLICATED,
)
_GATE_UP = Mapping(
    megatron="decoder.layers.{layer}.mlp.linear_fc1.weight",
    vllm="model.layers.{layer}.mlp.gate_up_proj.weight",
    hf=("model.layers.{layer}.mlp.gate_proj.weight", "model.layers.{layer}.mlp.up_proj.weight"),
    shapes=(("ffn", "hidden"), ("ffn", "hidden")),
    rule=Rule.GATE_UP,
)
_DOWN = Mapping(
    megatron="decoder.layers.{layer}.mlp.linear_fc2.weight",
    vllm="model.layers.{layer}.mlp.down_proj.weight",
    hf=("model.layers.{layer}.mlp.down_proj.weight",),
    shapes=(("hidden", "ffn"),),
    rule=Rule.ROW,
)
_OUTER: _Outer = {
    "embedding": Mapping(
        megatron="embedding.word_embeddings.weight",
        vllm="model.embed_tokens.weight",
        hf=("model.embed_tokens.weight",),
        shapes=(("vocabulary", "hidden"),),
        rule=Rule.VOCAB,
    ),
    "final_norm": Mapping(
        megatron="decoder.final_layernorm.weight",
        vllm="model.norm.weight",
        hf=("model.norm.weight",),
        shapes=(("hidden",),),
        rule=Rule.REPLICATED,
    ),
    "output": Mapping(
        megatron="output_layer.weight",
        vllm="lm_head.weight",
        hf=("lm_head.weight",),
        shapes=(("vocabulary", "hidden"),),
        rule=Rule.VOCAB,
    ),
    "score": Mapping(
        megatron="output_layer.weight",
        vllm="score.weight",
        hf=("score.weight",),
        shapes=(("one", "hidden"),),
        rule=Rule.REPLICATED,
    ),
}
_MLP = (_MLP_NORM, _GATE_UP, _DOWN)
_LLAMA_LAYER = (_INPUT_NORM, _QKV, _ATTENTION_OUTPUT, *_MLP)


def _families() -> Iterator[Family]:
    yield Family(model_type="llama", hf_class="LlamaForCausalLM", layer=_LLAMA_LAYER, **_OUTER, whole_heads=True)
    yield Family(
        model_type="mistral",
        hf_class="MistralForCausalLM",
        layer=_LLAMA_LAYER,
        **_OUTER,
        never_null=("num_key_value_heads",),
        forbidden=("layer_types",),
        config_defaults={"num_key_value_heads": 8, "sliding_window": 4096},
    )
    yield Family(
        model_type="qwen2",
        hf_class="Qwen2ForCausalLM",
        layer=(_INPUT_NORM, _QKV, _QKV_BIAS, _ATTENTION_OUTPUT, *_MLP),
        **_OUTER,
        free_head_size=False,
        never_null=("head_dim",),
        config_defaults={"num_key_value_heads": 32, "use_sliding_window": False},
    )
    yield Family(
        model_type="qwen3",
        hf_class="Qwen3ForCausalLM",
        layer=(_INPUT_NORM, _QKV, _Q_NORM, _K_NORM, _ATTENTION_OUTPUT, *_MLP),
        **_OUTER,
        never_null=("head_dim",),
        config_defaults={"num_key_value_heads": 32, "head_dim": 128, "use_sliding_window": False},
    )


FAMILIES: dict[str, Family] = {family.model_type: family for family in _families()}
