"""Which Megatron, vLLM and Hugging Face tensors hold each parameter of one model: its family's table, laid out."""

from collections.abc import Iterable, Iterator
from collections.abc import Mapping as Table
from dataclasses import dataclass
from math import prod

from megatron_async_rlhf.errors import CheckpointError
from megatron_async_rlhf.models.architecture import Architecture
from megatron_async_rlhf.models.families import FAMILIES, Mapping, Rule


@dataclass(frozen=True)
class PlacedMapping:
    """A mapping with its layer filled in and the part of the pipeline that owns it."""

    megatron: str  # name inside the owning chunk, where layers count from 0
    vllm: str
    hf: tuple[str, ...]
    rule: Rule
    stage: int
    chunk: int  # which of the stage's model chunks (virtual stages)


def model_mappings(arch: Architecture, pipeline_parallel: int, virtual_stages: int = 1) -> Iterator[PlacedMapping]:
    """Every parameter of the model once, first layer to last, the same on every rank.

    With several virtual stages the layers are dealt as Megatron's interleaved schedule does: the first chunk of every
    stage, then the second chunk of every stage, and so on.

    Tied embeddings appear once, on the first stage; the last stage's copy is filled by `copies_of_tied_embedding`.
    """
    family, parts = FAMILIES[arch.family], pipeline_parallel * virtual_stages
    for row, layer in _rows(arch):
        if layer is None:
            part, local_layer = (0 if row is family.embedding else parts - 1), 0
        else:
            part, local_layer = divmod(layer, arch.layers // parts)
        chunk, stage = divmod(part, pipeline_parallel)
        yield PlacedMapping(
            megatron=row.megatron.format(layer=local_layer),
            vllm=row.vllm.format(layer=layer),
            hf=tuple(name.format(layer=layer) for name in row.hf),
            rule=row.rule,
            stage=stage,
            chunk=chunk,
        )


def copies_of_tied_embedding(
    arch: Architecture, pipeline_parallel: int, virtual_stages: int = 1
) -> Iterator[PlacedMapping]:
    """The last stage's own copy of a tied embedding: read on import, never exported."""
    if arch.tie_embeddings and pipeline_parallel > 1:
        family = FAMILIES[arch.family]
        yield PlacedMapping(
            megatron=family.output.megatron,
            vllm=family.embedding.vllm,
            hf=family.embedding.hf,
            rule=family.output.rule,
            stage=pipeline_parallel - 1,
            chunk=virtual_stages - 1,
        )


def hf_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Shape of every Hugging Face tensor of the model, in the order of `model_mappings`."""
    sizes = {
        "vocabulary": arch.vocab_size,
        "hidden": arch.hidden_size,
        "ffn": arch.ffn_size,
        "query": arch.heads * arch.head_dim,
        "key_value": arch.kv_heads * arch.head_dim,
        "head": arch.head_dim,
        "one": 1,
    }
    return {
        name.format(layer=layer): tuple(sizes[size] for size in shape)
        for row, layer in _rows(arch)
        for name, shape in zip(row.hf, row.shapes, strict=True)
    }


def check_shapes(label: str, stored: Table[str, tuple[int, ...]], arch: Architecture) -> None:
    """Refuse weights that are not exactly those of the model.

    Args:
        label: what messages call the weights.
        stored: shape of every tensor there is, by its Hugging Face name.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or has no place in the model.
    """
    shapes, family = hf_shapes(arch), FAMILIES[arch.family]
    for name, shape in shapes.items():
        if name not in stored and name in family.score.hf:
            raise CheckpointError(
                f"{label}: architectures = [{family.classifier_class!r}] in config.json is a reward model's, but there is no "
                f"tensor {name}; name the class of the language model"
            )
        if name not in stored:
            raise CheckpointError(f"{label} has no tensor {name}{_similar(name, stored)}")
        if stored[name] != shape:
            raise CheckpointError(f"{label}: {name} has shape {stored[name]}, but config.json describes {shape}")
    for name in stored:
        if name in family.output.hf and arch.tie_embeddings:
            raise CheckpointError(
                f"{label}: {name} is not equal to {family.embedding.hf[0]}, although config.json says "
                "tie_word_embeddings = true; set that to false to use both, or remove the tensor"
            )
        if name not in shapes:
            raise CheckpointError(f"{label}: {name} has no place in a {arch.family} model of this config.json")


def _similar(name: str, stored: Iterable[str]) -> str:
    """What a missing tensor may be called instead, as in files of a base model or of one that wraps it."""
    bare = name.removeprefix("model.")
    found = next((other for other in stored if other.endswith(f".{bare}") or other == bare), None)
    if found is None:
        return ""
    return f", but {found}: save it as the causal language model itself, without another model around or inside it"


def elements_held(arch: Architecture, tensor_parallel: int) -> int:
    """Elements of all of one generator's shards together: what a push has to move at the least.

    Norms are whole on every rank; key and value heads repeat when there are fewer than ranks; all else is divided.
    """
    sizes = {name: prod(shape) for name, shape in hf_shapes(arch).items()}
    copies_of_kv = max(1, tensor_parallel // arch.kv_heads)
    total = 0
    for mapping in model_mappings(arch, 1):
        first, *others = (sizes[name] for name in mapping.hf)
        total += first * (tensor_parallel if mapping.rule is Rule.REPLICATED else 1)
        total += sum(others) * (copies_of_kv if mapping.rule is Rule.QKV else 1)
    return total


def _rows(arch: Architecture) -> Iterator[tuple[Mapping, int | None]]:
    """The family's rows in model order, each with its layer, if it belongs to one."""
    family = FAMILIES[arch.family]
    yield family.embedding, None
    for layer in range(arch.layers):
        yield from ((row, layer) for row in family.layer)
    yield family.final_norm, None
    if arch.has_score_head:
        yield family.score, None
    elif not arch.tie_embeddings:
        yield family.output, None
