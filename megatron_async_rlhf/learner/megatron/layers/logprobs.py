"""Token log-probabilities straight from hidden states, without the logits of a batch ever existing at once.

With a vocabulary of 128k the logits of 16k tokens take 8 GB in float32. Here the output matrix is applied to a block of
tokens at a time, in the backward pass once more but for the last block, which is kept. The vocabulary is divided over
tensor-parallel ranks.

Shape legend: N tokens, H hidden, V vocabulary entries of this rank.
"""

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_async_rlhf.learner.megatron.parallel import Placement

# Logits of one block, in float32 128 MiB and 512 MiB. Each adds to a gradient as large as the matrix, which on a GPU
# takes longer than the product itself if a block has few rows.
_BLOCK_ELEMENTS = {"cpu": 2**25, "cuda": 2**27}


def vocab_parallel_logprobs(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    vocab_size: int,
    temperature: float,
    placement: Placement,
    block_elements: int | None = None,
) -> torch.Tensor:
    """log softmax(hidden @ weight^T / temperature)[target] in float32, [N]; differentiable, the same on all ranks.

    Entries that only pad the vocabulary to a multiple of the ranks take no probability, as in Transformers and vLLM,
    which do not have them. Hidden states are whole on every rank, and so is their gradient.
    """
    first = placement.tensor_rank * weight_VH.shape[0]
    own = max(0, min(weight_VH.shape[0], vocab_size - first))
    group = parallel_state.get_tensor_model_parallel_group() if placement.tensor_parallel > 1 else None
    rows = max(1, (block_elements or _BLOCK_ELEMENTS[weight_VH.device.type]) // weight_VH.shape[0])
    return _LinearLogprobs.apply(hidden_NH, weight_VH, targets_N - first, own, 1.0 / temperature, group, rows)


class _LinearLogprobs(torch.autograd.Function):
    """Keeps between forward and backward the log of the softmax's denominator, and the last block's numerators."""

    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, targets_N, own, scale, group, rows):
        log_sum_N = hidden_NH.new_empty(len(hidden_NH), dtype=torch.float32)
        logprobs_N = torch.empty_like(log_sum_N)
        ctx.kept = None
        for begin in range(0, len(hidden_NH), rows):
            ctx.kept = None  # before the next block takes as much memory
            block = slice(begin, begin + rows)
            logits_BV = _logits(hidden_NH[block], weight_VH, own, scale)
            target_B, here_B = _of_targets(logits_BV, targets_N[block], own)
            max_B = logits_BV.amax(dim=-1) if own else torch.full_like(target_B, float("-inf"))
            _all_reduce(max_B, dist.ReduceOp.MAX, group)
            numerators_BV = logits_BV.sub_(max_B.unsqueeze(-1)).exp_()
            sums_2B = torch.stack([numerators_BV.sum(dim=-1), target_B * here_B])
            _all_reduce(sums_2B, dist.ReduceOp.SUM, group)
            log_sum_N[block] = max_B + sums_2B[0].log()
            logprobs_N[block] = sums_2B[1] - log_sum_N[block]
            ctx.kept = (begin, numerators_BV, sums_2B[0])
            del logits_BV, numerators_BV
        ctx.save_for_backward(hidden_NH, weight_VH, targets_N, log_sum_N)
        ctx.own, ctx.scale, ctx.group, ctx.rows = own, scale, group, rows
        return logprobs_N

    @staticmethod
    def backward(ctx, grad_N):
        hidden_NH, weight_VH, targets_N, log_sum_N = ctx.saved_tensors
        grad_hidden_NH = torch.empty_like(hidden_NH)
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32)
        own_VH = weight_VH[: ctx.own]
        kept, ctx.kept = ctx.kept, None  # used up by this pass
        for begin in reversed(range(0, len(hidden_NH), ctx.rows)):
            block = slice(begin, begin + ctx.rows)
            scaled_B = grad_N[block] * ctx.scale
            if kept is not None and kept[0] == begin:
                _, grad_BV, sum_B = kept
                kept = None
                grad_BV.mul_((-scaled_B / sum_B).unsqueeze(-1))
            else:
                grad_BV = _logits(hidden_NH[block], weight_VH, ctx.own, ctx.scale)
                grad_BV.sub_(log_sum_N[block].unsqueeze(-1)).exp_().mul_(-scaled_B.unsqueeze(-1))
            # So far -probability x grad; d logprob / d logit is 1 at the target - probability.
            here_B = (targets_N[block] >= 0) & (targets_N[block] < ctx.own)
            if ctx.own:
                safe_B = targets_N[block].clamp(0, ctx.own - 1).unsqueeze(-1)
                grad_BV.scatter_add_(-1, safe_B, (here_B * scaled_B).to(grad_BV.dtype).unsqueeze(-1))
            rounded_BV = grad_BV.to(own_VH.dtype)
            grad_hidden_NH[block] = rounded_BV @ own_VH
            _add_product(grad_weight_VH[: ctx.own], rounded_BV if weight_VH.is_cuda else grad_BV, hidden_NH[block])
            del grad_BV, rounded_BV
        # Here and not by Megatron's `copy_to_tensor_model_parallel_region`, which sums a copy of a gradient that is not
        # contiguous, and returns the gradient itself.
        _all_reduce(grad_hidden_NH, dist.ReduceOp.SUM, ctx.group)
        return grad_hidden_NH, grad_weight_VH.to(weight_VH.dtype), None, None, None, None, None


def _logits(hidden_BH: torch.Tensor, weight_VH: torch.Tensor, own: int, scale: float) -> torch.Tensor:
    """Scaled logits of the entries that are not padding, [B, own], in float32."""
    logits_BV = (hidden_BH @ weight_VH[:own].t()).float()
    return logits_BV if scale == 1.0 else logits_BV.mul_(scale)


def _add_product(sum_VH: torch.Tensor, grad_BV: torch.Tensor, hidden_BH: torch.Tensor) -> None:
    """sum += grad^T @ hidden, summed in float32 whatever the type of the factors."""
    if grad_BV.dtype == torch.float32:
        sum_VH.addmm_(grad_BV.t(), hidden_BH.float())
    else:  # which torch does on GPUs only
        torch.addmm(sum_VH, grad_BV.t(), hidden_BH, out_dtype=torch.float32, out=sum_VH)


def _of_targets(logits_BV: torch.Tensor, targets_B: torch.Tensor, own: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The target's logit where this rank has it (anything finite elsewhere), and whether it has, [B] each."""
    here_B = (targets_B >= 0) & (targets_B < own)
    if not own:
        return torch.zeros(len(targets_B), device=logits_BV.device), here_B
    return logits_BV.gather(-1, targets_B.clamp(0, own - 1).unsqueeze(-1)).squeeze(-1), here_B


def _all_reduce(tensor: torch.Tensor, operation: dist.ReduceOp, group: dist.ProcessGroup | None) -> None:
    if group is not None:
        dist.all_reduce(tensor, op=operation, group=group)
