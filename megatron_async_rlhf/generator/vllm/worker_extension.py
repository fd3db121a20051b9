"""What every vLLM worker does with the weights it computes with, beyond vLLM's own calls (`--worker-extension-cls`)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_async_rlhf.formats.digest import digest
from megatron_async_rlhf.generator.vllm.worker_model import WorkerModel
from megatron_async_rlhf.models.architecture import architecture_of_hf
from megatron_async_rlhf.models.hf_mapping import hf_shapes
from megatron_async_rlhf.models.layout import by_parameter, generator_pieces

# Smaller rectangles name a difference more closely; a digest is 16 bytes of this many.
_BOX_BYTES = 2**20


class WeightCalls:
    """Mixed into vLLM's worker class; called through its `collective_rpc`."""

    # Of that class. No values: vLLM refuses an extension that has an attribute of its worker.
    get_model: Callable[[], Any]
    model_config: Any
    parallel_config: Any
    start_weight_update: Callable[[], None]
    update_weights: Callable[[dict[str, Any]], None]
    finish_weight_update: Callable[[], None]

    def take_weights(self, verify: bool) -> None:
        """A push from beginning to end, in one call of the workers.

        Args:
            verify: of `SinkUpdate`.
        """
        self.start_weight_update()
        self.update_weights({"verify": verify})
        self.finish_weight_update()

    def weight_digests(self) -> dict[str, Any]:
        """Digests of everything this worker holds, in Hugging Face coordinates.

        Returns:
            `dtype`; `shapes`: [name, shape] of the whole model's tensors; `exact`: False if a matrix had to be read through its packed form, which loses the sign of zeros:
            then all digests are of values with positive zeros; `boxes`: [tensor, first row, end row, first column,
            end column, digest in hex] for each rectangle.
        """
        model = WorkerModel(self.get_model())
        ranks, rank = self.parallel_config.tensor_parallel_size, self.parallel_config.rank
        arch = architecture_of_hf(Path(self.model_config.model))
        exact, boxes = model.in_place, []
        dtype = self.model_config.dtype  # a bias may be kept as float32 beside weights in bf16
        for parameter, held in by_parameter(generator_pieces(arch, ranks, rank)).items():
            matrix = model.resident(parameter)
            for piece in held:
                (begin, end), (left, right) = piece.rows, piece.cols
                part = matrix[piece.row : piece.row + end - begin, piece.col : piece.col + right - left]
                step = max(1, _BOX_BYTES // ((right - left) * part.element_size()))
                for i, block in enumerate(part.split(step)):
                    first = begin + i * step
                    value = digest(block if exact else block + 0.0, dtype)
                    boxes.append([piece.tensor, first, first + block.shape[0], left, right, value.hex()])
        return {
            "dtype": str(dtype).removeprefix("torch."),
            "exact": exact,
            "shapes": list(hf_shapes(arch).items()),
            "boxes": boxes,
        }
