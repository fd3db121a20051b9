"""A model's parameters as Megatron saves them: whole tensors, whatever ranks had them or will have them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import assert_never

from megatron_async_rlhf.models.architecture import Architecture
from megatron_async_rlhf.models.families import Rule
from megatron_async_rlhf.models.hf_mapping import hf_shapes, model_mappings
from megatron_async_rlhf.models.layout import LearnerLayout, Piece, by_parameter, learner_pieces, parameter_shapes

# Saved under the name the norm has inside Transformer Engine's fused layers, even by a model without them.
_SAVED_AS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
_LAYERS = "decoder.layers."


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter of the whole model.

    Attributes:
        name: what a checkpoint calls it if it keeps layers apart; layers count through the model.
        layer: None outside the layers.
        rows, cols: without padding of the vocabulary.
        stage: pipeline stage that owns it.
        pieces: the rectangles of Hugging Face tensors in it, each as wide as the parameter.
    """

    name: str
    layer: int | None
    is_vector: bool
    rows: int
    cols: int
    rule: Rule
    stage: int
    pieces: tuple[Piece, ...]

    @property
    def key(self) -> str:
        """What a checkpoint calls it if it stacks the layers under one key, which Megatron does by default."""
        return self.name if self.layer is None else self.name.replace(f"{_LAYERS}{self.layer}.", _LAYERS, 1)


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one tensor-parallel rank saves of a parameter, in one chunk."""

    tensor_rank: int
    row: int
    col: int
    rows: int
    cols: int


def model_parameters(arch: Architecture, pipeline_parallel: int = 1) -> list[Parameter]:
    """Every parameter once, in model order. A tied embedding is saved by the first stage alone."""
    held = learner_pieces(arch, LearnerLayout(), 0)
    pieces, sizes = by_parameter(held), parameter_shapes(held)
    shapes = hf_shapes(arch)
    return [
        Parameter(
            name=_saved_name(whole.megatron),
            layer=_layer_of(whole.megatron),
            is_vector=len(shapes[whole.hf[0]]) == 1,
            rows=sizes[whole.megatron][0],
            cols=sizes[whole.megatron][1],
            rule=whole.rule,
            stage=placed.stage,
            pieces=tuple(pieces[whole.megatron]),
        )
        for whole, placed in zip(model_mappings(arch, 1), model_mappings(arch, pipeline_parallel), strict=True)
    ]


def padded_rows(parameter: Parameter, tensor_parallel: int) -> int:
    """Rows of the saved tensor: those of the vocabulary are padded to a multiple of the ranks."""
    if parameter.rule is not Rule.VOCAB:
        return parameter.rows
    return -(-parameter.rows // tensor_parallel) * tensor_parallel


def shares_of(parameter: Parameter, tensor_parallel: int) -> Iterator[Share]:
    """What each rank saves; what all ranks have, only the first one does. The sizes must be divisible."""
    rows, cols, ranks = padded_rows(parameter, tensor_parallel), parameter.cols, tensor_parallel
    match parameter.rule:
        case Rule.REPLICATED:
            yield Share(tensor_rank=0, row=0, col=0, rows=rows, cols=cols)
        case Rule.ROW:
            for rank in range(ranks):
                yield Share(tensor_rank=rank, row=0, col=rank * cols // ranks, rows=rows, cols=cols // ranks)
        case Rule.GATE_UP:
            half = rows // 2
            for rank in range(ranks):
                for first in (0, half):
                    row = first + rank * half // ranks
                    yield Share(tensor_rank=rank, row=row, col=0, rows=half // ranks, cols=cols)
        case Rule.COLUMN | Rule.VOCAB | Rule.QKV:
            for rank in range(ranks):
                yield Share(tensor_rank=rank, row=rank * rows // ranks, col=0, rows=rows // ranks, cols=cols)
        case _:
            assert_never(parameter.rule)


def _saved_name(name: str) -> str:
    for before, after in _SAVED_AS.items():
        name = name.replace(before, after)
    return name


def _layer_of(name: str) -> int | None:
    return int(name.removeprefix(_LAYERS).split(".")[0]) if name.startswith(_LAYERS) else None
