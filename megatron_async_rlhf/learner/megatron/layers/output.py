"""The output layer without its multiplication: the model returns hidden states, `logprobs` does the rest in blocks."""

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    gather_from_sequence_parallel_region,
)
from megatron.core.utils import get_attr_wrapped_model


class DeferredOutput(ColumnParallelLinear):
    """Keeps the parameter, its name and its sharding; hands on the hidden states, [T, B, H]."""

    def forward(
        self, input_: torch.Tensor, weight: torch.Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[torch.Tensor, None]:
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(input_, tensor_parallel_output_grad=False), None
        return input_, None


def defer_output(model: GPTModel) -> None:
    """Make the last stage of `model` return hidden states, [B, T, H], instead of logits."""
    if model.post_process:
        model.output_layer.__class__ = DeferredOutput


def output_matrix(model: torch.nn.Module) -> torch.Tensor:
    """The matrix, [V, H], that belongs to the hidden states of a last stage; with tied embeddings, theirs."""
    if get_attr_wrapped_model(model, "share_embeddings_and_output_weights"):
        return get_attr_wrapped_model(model, "shared_embedding_or_output_weight")()
    return get_attr_wrapped_model(model, "output_layer").weight
