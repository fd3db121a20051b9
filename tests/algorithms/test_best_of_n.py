import pytest
import torch
import torch.nn.functional as F
from packed_rows import LENGTHS, PackedRow

from megatron_async_rlhf.algorithms.best_of_n import best_of_n_loss


def test_equals_summed_cross_entropy_per_sequence():
    generator = torch.Generator().manual_seed(0)
    logits_SLV = torch.randn(len(LENGTHS), max(LENGTHS), 13, generator=generator, dtype=torch.float64).requires_grad_()
    targets_SL = torch.randint(13, logits_SLV.shape[:2], generator=generator)
    row = PackedRow(LENGTHS)
    logprobs_SL = logits_SLV.log_softmax(-1).gather(-1, targets_SL.unsqueeze(-1)).squeeze(-1)
    policy_S = torch.cat([row.segments.sum(row.lay(logprobs_SL)), torch.tensor([float("nan")])])
    mask_S = torch.arange(len(LENGTHS) + 1) < len(LENGTHS)
    ours, metrics = best_of_n_loss(policy_S, mask_S, num_sequences=len(LENGTHS))
    targets_SL = targets_SL.masked_fill(~row.mask_SL, -100)
    theirs = F.cross_entropy(logits_SLV.flatten(0, 1), targets_SL.flatten(), reduction="sum") / len(LENGTHS)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits_SLV)[0] for loss in (ours, theirs)))
    assert metrics["loss"] == ours.detach() and not metrics["loss"].requires_grad


def test_micro_batches_with_the_step_s_count_add_up():
    policy_S, mask_S = torch.tensor([-3.0, -1.0, -0.5, -9.0]), torch.tensor([True, True, True, False])
    parts = [best_of_n_loss(policy_S[s], mask_S[s], num_sequences=3)[0].item() for s in ([0, 3], [1, 2])]
    assert sum(parts) == pytest.approx(1.5)
