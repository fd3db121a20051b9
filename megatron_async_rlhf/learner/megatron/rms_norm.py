"""RMSNorm for Megatron's layers on any device, with or without sequence parallelism."""

import torch
from megatron.core.transformer import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` with the arguments of a Megatron layer spec.

    Megatron's own wrapper of it refuses sequence parallelism, where a rank normalises its share of the tokens only:
    the mark on the weight makes `finalize_model_grads` sum its gradient over the tensor-parallel ranks. The norms
    of queries and keys see all tokens, of the rank's own heads; Megatron sums theirs by name, mark or none.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel
