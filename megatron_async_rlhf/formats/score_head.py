"""Weights of a model with a score head, whether the files have the head or it has yet to be learned."""

from collections.abc import Mapping

import torch

from megatron_async_rlhf.formats.stored import WeightReader
from megatron_async_rlhf.formats.tensor_spec import TensorSpec

HF_HEAD = "score.weight"  # of Transformers' models for sequence classification, [1, H]


class WithScoreHead:
    """A `WeightReader` of a language model, or of a model that has a score head itself."""

    def __init__(self, body: WeightReader, head: torch.Tensor) -> None:
        """
        Args:
            head: what stands for a head that `body` lacks, float32 [1, H].
        """
        self.label, self._body, self._head = body.label, body, head
        shape = (1, head.shape[1])
        self._tensors: dict[str, TensorSpec] = {HF_HEAD: TensorSpec(HF_HEAD, shape, "float32"), **body.tensors}

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        return self._tensors

    def read_into(self, target: torch.Tensor, name: str, row: int, col: int) -> None:
        """As `WeightReader.read_into`."""
        if name != HF_HEAD or name in self._body.tensors:
            self._body.read_into(target, name, row, col)
            return
        rows, cols = target.shape
        target.copy_(self._head[row : row + rows, col : col + cols])
