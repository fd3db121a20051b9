"""The policy's weights in Hugging Face coordinates: read into this rank's shards, or gathered whole on rank 0."""

import hashlib
from collections.abc import Iterator
from functools import lru_cache

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel

from megatron_async_rlhf.errors import MappingError
from megatron_async_rlhf.formats.stored import TensorSpec, WeightReader, find_tensor, read_blocks
from megatron_async_rlhf.learner.megatron.parallel import Placement
from megatron_async_rlhf.models.architecture import Architecture
from megatron_async_rlhf.models.families import FAMILIES, Rule
from megatron_async_rlhf.models.hf_mapping import copies_of_tied_embedding, hf_shapes, model_mappings
from megatron_async_rlhf.models.layout import Piece, by_parameter, learner_pieces, matrix_shape, parameter_shapes
from megatron_async_rlhf.weights.send import as_matrix

# Transformer Engine fuses a norm into the linear layer behind it.
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def named_parameters(chunks: list[GPTModel]) -> dict[str, torch.nn.Parameter]:
    """This rank's parameters by the names that `weights.layout` has for them."""
    found = {}
    for number, chunk in enumerate(chunks):
        prefix = f"{number}:" if len(chunks) > 1 else ""
        for name, parameter in chunk.named_parameters():
            for fused, apart in _FUSED_NORMS.items():
                name = name.replace(fused, apart)
            found[prefix + name] = parameter
    return found


@torch.no_grad()
def load_weights(chunks: list[GPTModel], arch: Architecture, placement: Placement, reader: WeightReader) -> None:
    """Fill this rank's parameters, reading only what belongs to them; padding of the vocabulary becomes zero.

    Raises:
        CheckpointError: a tensor is missing.
        MappingError: a tensor whose shape does not fit the architecture.
    """
    parameters = named_parameters(chunks)
    # By name alone: a share of the vocabulary may be all padding and have no piece.
    layout = placement.layout
    placed = (
        *model_mappings(arch, layout.pipeline_parallel, layout.virtual_stages),
        *copies_of_tied_embedding(arch, layout.pipeline_parallel, layout.virtual_stages),
    )
    mapped = {layout.name_of(mapping) for mapping in placed if mapping.stage == placement.pipeline_rank}
    if unmapped := set(parameters) - mapped:
        raise MappingError(f"no Hugging Face tensor is mapped to {min(unmapped)}; the family's table lacks it")
    shapes = hf_shapes(arch)
    pieces_of = by_parameter(learner_pieces(arch, layout, placement.rank))
    for name, parameter in parameters.items():
        parameter.zero_()
        for piece in pieces_of.get(name, []):
            _read_piece(reader, piece, shapes[piece.tensor], _place(parameter, piece))


def _read_piece(reader: WeightReader, piece: Piece, shape: tuple[int, ...], target: torch.Tensor) -> None:
    found = find_tensor(reader, piece.tensor).shape
    if found != shape:
        raise MappingError(f"{piece.tensor} has shape {found}, the configured model needs {shape}")
    if not target.is_cuda:
        reader.read_into(target, piece.tensor, piece.rows[0], piece.cols[0])
        return
    row = 0
    for block in read_blocks(reader, piece.tensor, piece.rows, piece.cols, target.dtype):
        target[row : row + len(block)].copy_(block)
        row += len(block)


@torch.no_grad()
def gather_weights(
    chunks: list[GPTModel], arch: Architecture, placement: Placement
) -> Iterator[tuple[str, torch.Tensor]]:
    """Whole Hugging Face tensors, one mapping at a time, on rank 0's host; the other ranks send and yield nothing.

    Collective: every rank of data-parallel replica 0 must exhaust it. Tensors stay valid only until the next one is
    asked for.
    """
    layout, shapes = placement.layout, hf_shapes(arch)
    if placement.rank % (layout.tensor_parallel * layout.data_parallel) >= layout.tensor_parallel:
        return
    parameters = named_parameters(chunks)
    dtype = next(iter(parameters.values())).dtype
    pieces_of = [by_parameter(learner_pieces(arch, layout, rank)) for rank in range(layout.ranks)]
    for mapping in model_mappings(arch, layout.pipeline_parallel, layout.virtual_stages):
        whole, name = {}, layout.name_of(mapping)
        if placement.rank == 0:
            whole = {tensor: torch.empty(matrix_shape(shapes[tensor]), dtype=dtype) for tensor in mapping.hf}
        first = mapping.stage * layout.tensor_parallel * layout.data_parallel
        for owner in range(first, first + layout.tensor_parallel):
            pieces = pieces_of[owner].get(name, [])
            if not pieces or placement.rank not in (0, owner):  # a share of the vocabulary may be all padding
                continue
            rows, cols = parameter_shapes(pieces)[name]
            mine = None
            if placement.rank == owner:
                mine = as_matrix(parameters[name].detach())[:rows].to("cpu", dtype)
            if placement.rank != 0:
                dist.send(mine, dst=0, group=placement.control)
                continue
            if owner != 0:
                mine = torch.empty(rows, cols, dtype=dtype)
                dist.recv(mine, src=owner, group=placement.control)
            for piece in pieces:
                whole[piece.tensor][slice(*piece.rows), slice(*piece.cols)] = _place(mine, piece)
        yield from ((tensor, values.view(shapes[tensor])) for tensor, values in whole.items())


class RandomWeights:
    """Fresh weights drawn per Hugging Face tensor, so that every layout starts from the same bits; a `WeightReader`.

    Normal with `init_std`; projections back into the residual stream are scaled by 1/sqrt(2 x layers) (GPT-2). A score
    head is normal with 1/sqrt(hidden size + 1) (Stiennon et al., arXiv 2009.01325): rewards of about 1 at the start.
    """

    label = "fresh weights"

    def __init__(self, arch: Architecture, seed: int) -> None:
        self.tensors = {name: TensorSpec(name, shape, "float32") for name, shape in hf_shapes(arch).items()}
        self._arch, self._seed = arch, seed
        self._rules = {name: mapping.rule for mapping in model_mappings(arch, 1) for name in mapping.hf}
        self._draw = lru_cache(maxsize=4)(self._draw_tensor)  # query, key and value are asked for in turn

    def read_into(self, target: torch.Tensor, name: str, row: int, col: int) -> None:
        """As `WeightReader.read_into`."""
        rows, cols = target.shape
        target.copy_(self._draw(name)[row : row + rows, col : col + cols])

    def _draw_tensor(self, name: str) -> torch.Tensor:
        shape = matrix_shape(self.tensors[name].shape)
        if len(self.tensors[name].shape) == 1:  # a norm, or a bias
            return torch.ones(shape) if self._rules[name] is Rule.REPLICATED else torch.zeros(shape)
        digest = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        std = self._arch.init_std
        if name in FAMILIES[self._arch.family].score.hf:
            std = (self._arch.hidden_size + 1) ** -0.5
        if self._rules[name] is Rule.ROW:
            std /= (2 * self._arch.layers) ** 0.5
        return torch.randn(shape, generator=generator) * std


def _place(parameter: torch.Tensor, piece: Piece) -> torch.Tensor:
    """Where a piece lies in a parameter, [rows, columns], a view."""
    rows, cols = piece.rows[1] - piece.rows[0], piece.cols[1] - piece.cols[0]
    return as_matrix(parameter)[piece.row : piece.row + rows, piece.col : piece.col + cols]
