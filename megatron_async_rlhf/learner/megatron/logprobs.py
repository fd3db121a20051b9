"""Token log-probabilities from logits that are divided over tensor-parallel ranks by vocabulary.

Shape legend: B sequences, T tokens, V vocabulary entries of this rank.
"""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region

from megatron_async_rlhf.learner.megatron.parallel import Placement


def vocab_parallel_logprobs(
    logits_BTV: torch.Tensor, targets_BT: torch.Tensor, *, vocab_size: int, temperature: float, placement: Placement
) -> torch.Tensor:
    """log softmax(logits / temperature)[target] in float32, [B, T]; differentiable, the same on all ranks.

    Entries that only pad the vocabulary to a multiple of the ranks take no probability, as in Transformers and
    vLLM, which do not have them.
    """
    logits_BTV = logits_BTV.float() / temperature
    local = logits_BTV.shape[-1]
    first = placement.tensor_rank * local
    if first + local > vocab_size:
        padding = torch.arange(first, first + local, device=logits_BTV.device) >= vocab_size
        logits_BTV = logits_BTV.masked_fill(padding, float("-inf"))
    max_BT = logits_BTV.detach().amax(dim=-1)
    if placement.tensor_parallel > 1:
        dist.all_reduce(max_BT, op=dist.ReduceOp.MAX, group=parallel_state.get_tensor_model_parallel_group())
    shifted_BTV = logits_BTV - max_BT.unsqueeze(-1)
    sum_exp_BT = reduce_from_tensor_model_parallel_region(shifted_BTV.exp().sum(dim=-1))
    local_targets_BT = targets_BT - first
    here_BT = (local_targets_BT >= 0) & (local_targets_BT < local)
    safe_targets_BT = local_targets_BT.clamp(0, local - 1).unsqueeze(-1)
    target_BT = shifted_BTV.gather(-1, safe_targets_BT).squeeze(-1).masked_fill(~here_BT, 0.0)
    return reduce_from_tensor_model_parallel_region(target_BT) - sum_exp_BT.log()
