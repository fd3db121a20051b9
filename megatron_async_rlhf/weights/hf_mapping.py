"""Which Megatron parameter holds which Hugging Face tensors, and how: a table per family, no code per model."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from math import prod

from megatron_async_rlhf.config.architecture import Architecture
from megatron_async_rlhf.weights.buckets import TensorSpec


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
    """One Megatron parameter. `{layer}` stands for the model-wide layer index in both name spaces."""

    megatron: str
    hf: tuple[str, ...]
    rule: Rule


_LLAMA_LAYER = (
    Mapping("decoder.layers.{layer}.input_layernorm.weight", ("model.layers.{layer}.input_layernorm.weight",), Rule.REPLICATED),
    Mapping(
        "decoder.layers.{layer}.self_attention.linear_qkv.weight",
        (
            "model.layers.{layer}.self_attn.q_proj.weight",
            "model.layers.{layer}.self_attn.k_proj.weight",
            "model.layers.{layer}.self_attn.v_proj.weight",
        ),
        Rule.QKV,
    ),
    Mapping("decoder.layers.{layer}.self_attention.linear_proj.weight", ("model.layers.{layer}.self_attn.o_proj.weight",), Rule.ROW),
    Mapping(
        "decoder.layers.{layer}.pre_mlp_layernorm.weight",
        ("model.layers.{layer}.post_attention_layernorm.weight",),
        Rule.REPLICATED,
    ),
    Mapping(
        "decoder.layers.{layer}.mlp.linear_fc1.weight",
        ("model.layers.{layer}.mlp.gate_proj.weight", "model.layers.{layer}.mlp.up_proj.weight"),
        Rule.GATE_UP,
    ),
    Mapping("decoder.layers.{layer}.mlp.linear_fc2.weight", ("model.layers.{layer}.mlp.down_proj.weight",), Rule.ROW),
)  # fmt: skip
_EMBEDDING = Mapping("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), Rule.VOCAB)
_FINAL_NORM = Mapping("decoder.final_layernorm.weight", ("model.norm.weight",), Rule.REPLICATED)
_OUTPUT = Mapping("output_layer.weight", ("lm_head.weight",), Rule.VOCAB)


@dataclass(frozen=True)
class PlacedMapping:
    """A mapping with its layer filled in and the pipeline stage that owns it."""

    megatron: str  # name inside the owning stage, where layers count from 0
    hf: tuple[str, ...]
    rule: Rule
    stage: int


def llama_mappings(arch: Architecture, pipeline_parallel: int) -> Iterator[PlacedMapping]:
    """Every parameter of the model once, first layer to last, the same on every rank.

    Tied embeddings appear once, on the first stage; the last stage's copy is filled by `copies_of_tied_embedding`.
    """
    yield PlacedMapping(_EMBEDDING.megatron, _EMBEDDING.hf, _EMBEDDING.rule, 0)
    layers_per_stage = arch.layers // pipeline_parallel
    for layer in range(arch.layers):
        stage, local_layer = divmod(layer, layers_per_stage)
        for mapping in _LLAMA_LAYER:
            yield PlacedMapping(
                mapping.megatron.format(layer=local_layer),
                tuple(name.format(layer=layer) for name in mapping.hf),
                mapping.rule,
                stage,
            )
    last = pipeline_parallel - 1
    yield PlacedMapping(_FINAL_NORM.megatron, _FINAL_NORM.hf, _FINAL_NORM.rule, last)
    if not arch.tie_embeddings:
        yield PlacedMapping(_OUTPUT.megatron, _OUTPUT.hf, _OUTPUT.rule, last)


def copies_of_tied_embedding(arch: Architecture, pipeline_parallel: int) -> Iterator[PlacedMapping]:
    """The last stage's own copy of a tied embedding: read on import, never exported."""
    if arch.tie_embeddings and pipeline_parallel > 1:
        yield PlacedMapping(_OUTPUT.megatron, _EMBEDDING.hf, _OUTPUT.rule, pipeline_parallel - 1)


def hf_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Shape of every Hugging Face tensor of the model, in the order of `llama_mappings`."""
    hidden, ffn, head = arch.hidden_size, arch.ffn_size, arch.head_dim
    layer_shapes = {
        "input_layernorm": (hidden,),
        "q_proj": (arch.heads * head, hidden),
        "k_proj": (arch.kv_heads * head, hidden),
        "v_proj": (arch.kv_heads * head, hidden),
        "o_proj": (hidden, arch.heads * head),
        "post_attention_layernorm": (hidden,),
        "gate_proj": (ffn, hidden),
        "up_proj": (ffn, hidden),
        "down_proj": (hidden, ffn),
        "embed_tokens": (arch.vocab_size, hidden),
        "norm": (hidden,),
        "lm_head": (arch.vocab_size, hidden),
    }
    names = (name for mapping in llama_mappings(arch, 1) for name in mapping.hf)
    return {name: layer_shapes[name.split(".")[-2]] for name in names}


def tensor_specs(arch: Architecture) -> list[TensorSpec]:
    """What a push of the whole model puts on the wire, in sending order, in float32."""
    return [
        TensorSpec(name=name, shape=list(shape), dtype="float32", num_bytes=4 * prod(shape))
        for name, shape in hf_shapes(arch).items()
    ]


def bytes_held(arch: Architecture, tensor_parallel: int) -> int:
    """Bytes of all of one generator's shards together: what a push has to move at the least.

    Norms are whole on every rank; key and value heads repeat when there are fewer than ranks; all else is divided.
    """
    copies_of_kv = max(1, tensor_parallel // arch.kv_heads)
    total = 0
    for spec in tensor_specs(arch):
        if len(spec.shape) == 1:
            total += spec.num_bytes * tensor_parallel
        elif spec.name.endswith(("k_proj.weight", "v_proj.weight")):
            total += spec.num_bytes * copies_of_kv
        else:
            total += spec.num_bytes
    return total
