import pytest
import torch
import torch.nn.functional as F

from megatron_async_rlhf.algorithms.supervised import supervised_loss

LENGTHS = [7, 3, 0, 1]  # completion tokens of each row; one is empty


@pytest.fixture
def logits_BTV() -> torch.Tensor:
    return torch.randn(4, 9, 13, generator=torch.Generator().manual_seed(0)).requires_grad_()


@pytest.fixture
def targets_BT() -> torch.Tensor:
    return torch.randint(13, (4, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def mask_BT() -> torch.Tensor:
    return torch.tensor([[float(1 <= t < 1 + length) for t in range(9)] for length in LENGTHS])


def logprobs_of(logits_BTV: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
    return logits_BTV.log_softmax(-1).gather(-1, targets_BT.unsqueeze(-1)).squeeze(-1)


def test_equals_cross_entropy_over_the_completion_tokens(logits_BTV, targets_BT, mask_BT):
    ours, metrics = supervised_loss(logprobs_of(logits_BTV, targets_BT), mask_BT, num_tokens=sum(LENGTHS))
    theirs = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.masked_fill(mask_BT == 0, -100).flatten())
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert metrics["loss"] == ours.detach()
    assert not metrics["loss"].requires_grad
    (our_gradient,) = torch.autograd.grad(ours, logits_BTV)
    (their_gradient,) = torch.autograd.grad(theirs, logits_BTV)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-5, atol=1e-8)


def test_micro_batches_with_the_step_s_token_count_add_up(logits_BTV, targets_BT, mask_BT):
    logprobs_BT = logprobs_of(logits_BTV, targets_BT)
    whole, _ = supervised_loss(logprobs_BT, mask_BT, num_tokens=sum(LENGTHS))
    parts = [supervised_loss(logprobs_BT[rows], mask_BT[rows], num_tokens=sum(LENGTHS))[0] for rows in ([0, 3], [1, 2])]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-6, atol=0)


def test_by_hand():
    total, _ = supervised_loss(torch.tensor([[-1.0, -2.0, -4.0]]), torch.tensor([[0.0, 1.0, 1.0]]), num_tokens=3)
    assert total == 2.0
