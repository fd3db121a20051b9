"""RMSNorm for Megatron's layers on a CPU, with or without sequence parallelism."""

import torch
from megatron.core.transformer import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` with the arguments of a Megatron layer spec, in half the passes over memory.

    Megatron's own wrapper of it refuses sequence parallelism, where a rank normalises its share of the tokens only:
    the mark on the weight makes `finalize_model_grads` sum its gradient over the tensor-parallel ranks. The norms
    of queries and keys see all tokens, of the rank's own heads; Megatron sums theirs by name, mark or none.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype not in (torch.float32, torch.float64):
            return super().forward(x)  # which sums in float32
        return _RMSNorm.apply(x, self.weight, self.eps)


class SeparateRMSNorm(RMSNorm):
    """A norm that is a module of its own in Transformer Engine's layers too: not one fused into the linear behind it.

    There it has an extra state, which Megatron asks a checkpoint for; saving that we have none, as Megatron's own linear
    layers do, lets those layers load what these saved.
    """

    def get_extra_state(self) -> None: ...

    def set_extra_state(self, state: object) -> None:
        """There is nothing to keep of Transformer Engine's."""


class _RMSNorm(torch.autograd.Function):
    """y = x / r * weight, r = sqrt(mean(x^2) + eps); x is [..., H]."""

    @staticmethod
    def forward(ctx, x, weight_H, eps):
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = inverse.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        normal = x * inverse
        ctx.save_for_backward(normal, weight_H, inverse)
        return normal * weight_H

    @staticmethod
    def backward(ctx, grad):
        normal, weight_H, inverse = ctx.saved_tensors
        product = grad * normal
        grad_weight_H = product.flatten(0, -2).sum(0)
        # What r gives back, as it depends on all of x: -normal x mean(grad x weight x normal).
        shared = (product @ weight_H).unsqueeze(-1).div_(-normal.shape[-1])
        grad_x = torch.mul(grad, weight_H, out=product).addcmul_(normal, shared).mul_(inverse)
        return grad_x, grad_weight_H, None
