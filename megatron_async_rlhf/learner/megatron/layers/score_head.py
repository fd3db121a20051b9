"""The head of a model that gives each token a number: a value model's values, a reward model's rewards."""

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig


class ScoreHead(torch.nn.Module):
    """Stands where `GPTModel` has its output layer: hidden states, [T, B, H], to numbers, [T, B, 1], in float32.

    Its one row is whole on every tensor-parallel rank. With sequence parallelism a rank computes the numbers of its
    share of the tokens; the mark on the row has Megatron sum its gradient over the tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, config.hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel
        self.sequence_parallel = config.sequence_parallel

    def forward(
        self, input_: torch.Tensor, weight: None = None, runtime_gather_output: bool | None = None
    ) -> tuple[torch.Tensor, None]:
        values = F.linear(input_.float(), self.weight.float())
        if self.sequence_parallel:
            values = gather_from_sequence_parallel_region(values, tensor_parallel_output_grad=False)
        return values, None
