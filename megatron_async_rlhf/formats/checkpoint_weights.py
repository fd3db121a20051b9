"""A checkpoint's weights under their Hugging Face names."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_async_rlhf.errors import CheckpointError
from megatron_async_rlhf.formats.parameters import Parameter, model_parameters
from megatron_async_rlhf.formats.reader import TorchDistReader
from megatron_async_rlhf.formats.stored import DTYPES, TensorSpec, find_tensor
from megatron_async_rlhf.models.architecture import Architecture
from megatron_async_rlhf.models.families import Rule
from megatron_async_rlhf.models.hf_mapping import hf_shapes

_MODEL_KEYS = ("embedding.", "decoder.", "output_layer.")  # the rest is the optimizer's and the schedule's


@dataclass(frozen=True, slots=True)
class _Part:
    """`rows` rows of a parameter or of a Hugging Face tensor from `row` on, and the saved rows they are."""

    row: int
    rows: int
    key: str
    layer: int | None
    saved_row: int


class CheckpointWeights:
    """The weights of a checkpoint, a `WeightReader`.

    `tensors` lacks what the checkpoint lacks, and has under Megatron's names what the model has no place for.
    """

    def __init__(self, directory: Path, arch: Architecture) -> None:
        """
        Raises:
            CheckpointError: not a `torch_dist` checkpoint, or one of a model of another shape.
        """
        self.label = str(directory)
        self._reader = TorchDistReader(directory)
        self._parts: dict[str, list[_Part]] = {}
        self._keys: set[str] = set()
        dtypes: dict[str, str] = {}
        for parameter in model_parameters(arch):
            saved = self._find(parameter, arch)
            self._keys.update(part.key for part in saved)
            for piece in parameter.pieces:
                for part in saved:
                    if part.row <= piece.row < part.row + part.rows:
                        saved_row = part.saved_row + piece.row - part.row
                        rows = piece.rows[1] - piece.rows[0]
                        part_of_tensor = _Part(piece.rows[0], rows, part.key, part.layer, saved_row)
                        self._parts.setdefault(piece.tensor, []).append(part_of_tensor)
                        dtypes[piece.tensor] = self._dtype_of(part.key)
        shapes = hf_shapes(arch)
        self.tensors: dict[str, TensorSpec] = {
            name: TensorSpec(name, shape, dtypes[name]) for name, shape in shapes.items() if name in dtypes
        }
        self.tensors |= {spec.name: spec for spec in self._without_a_place()}

    def read_into(self, target: torch.Tensor, name: str, row: int, col: int) -> None:
        """As `WeightReader.read_into`."""
        find_tensor(self, name)
        for part in self._parts[name]:
            top, bottom = max(row, part.row), min(row + target.shape[0], part.row + part.rows)
            if top < bottom:
                rows = target[top - row : bottom - row]
                self._reader.read_into(rows, part.key, part.layer, part.saved_row + top - part.row, col)

    def _find(self, parameter: Parameter, arch: Architecture) -> list[_Part]:
        """Where a parameter is: layers stacked, layers apart, or gate and up apart as well; none if it is missing."""
        rows = parameter.rows
        if parameter.key in self._reader.tensors:
            found = [_Part(0, rows, parameter.key, parameter.layer, 0)]
        elif parameter.name in self._reader.tensors:
            found = [_Part(0, rows, parameter.name, None, 0)]
        elif parameter.rule is Rule.GATE_UP and f"{parameter.name}_w" in self._reader.tensors:
            halves = [(0, f"{parameter.name}_w"), (rows // 2, f"{parameter.name}_v")]
            found = [_Part(row, rows // 2, key, None, 0) for row, key in halves if key in self._reader.tensors]
        else:
            return []
        for part in found:
            self._check_shape(part, parameter, arch)
        return found

    def _check_shape(self, part: _Part, parameter: Parameter, arch: Architecture) -> None:
        shape = tuple(self._reader.tensors[part.key].size)
        needed = (part.rows,) if parameter.is_vector else (part.rows, parameter.cols)
        if part.layer is not None:
            needed = (arch.layers, *needed)
        padded = parameter.rule is Rule.VOCAB and shape[1:] == needed[1:] and shape[0] > needed[0]
        if shape != needed and not padded:
            raise CheckpointError(f"{self.label}: {part.key} has shape {shape}, but config.json describes {needed}")

    def _dtype_of(self, key: str) -> str:
        name = _dtype_name(self._reader.tensors[key])
        if name not in DTYPES:
            raise CheckpointError(f"{self.label}: {key} is {name}; only weights in {', '.join(DTYPES)} can be read")
        return name

    def _without_a_place(self) -> list[TensorSpec]:
        return [
            TensorSpec(key, tuple(entry.size), _dtype_name(entry))
            for key, entry in self._reader.tensors.items()
            if key.startswith(_MODEL_KEYS) and "_extra_state" not in key and key not in self._keys
        ]


def _dtype_name(entry: TensorStorageMetadata) -> str:
    return str(entry.properties.dtype).removeprefix("torch.")
