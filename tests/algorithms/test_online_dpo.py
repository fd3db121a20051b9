from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from megatron_async_rlhf.algorithms.online_dpo import online_dpo_loss

LOSSES = ["sigmoid", "ipo"]


def pairs(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Policy chosen and rejected (with gradients), reference chosen and rejected: plausible sums over a completion."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [(-40 + 8 * torch.randn(count, generator=generator)).to(dtype) for _ in range(4)]
    return [tensors[0].requires_grad_(), tensors[1].requires_grad_(), *tensors[2:]]


def one_pair(h_chosen: float, h_rejected: float, beta: float, loss: str):
    values = [torch.tensor([v]) for v in (h_chosen - 20, h_rejected - 30, -20.0, -30.0)]
    policy = [values[0].requires_grad_(), values[1].requires_grad_()]
    total, metrics = online_dpo_loss(*policy, *values[2:], torch.ones(1), beta=beta, loss=loss, num_pairs=1)
    return total.item(), metrics, [g.item() for g in torch.autograd.grad(total, policy)]


def test_sigmoid_by_hand():
    # beta h = 0.5 x (1 - -3) = 2: -log(1 / (1 + e^-2)) = 0.126928; slope -beta (1 - sigmoid(2)) = -0.5 x 0.119203
    total, metrics, gradients = one_pair(1.0, -3.0, 0.5, "sigmoid")
    assert total == pytest.approx(0.126928, abs=1e-6)
    assert gradients == pytest.approx([-0.0596015, 0.0596015], abs=1e-6)
    assert metrics["dpo/margin"].item() == pytest.approx(2.0)
    assert metrics["dpo/chosen_ratio"].item() == pytest.approx(0.5)
    assert metrics["dpo/rejected_ratio"].item() == pytest.approx(-1.5)
    assert metrics["dpo/accuracy"].item() == 1.0
    assert metrics["kl_to_reference"].item() == pytest.approx(-1.0)


def test_ipo_by_hand():
    # h = 4, target 1 / (2 x 0.25) = 2: (4 - 2)^2 = 4, slope 2 (4 - 2) = 4
    total, metrics, gradients = one_pair(1.0, -3.0, 0.25, "ipo")
    assert total == pytest.approx(4.0)
    assert gradients == pytest.approx([4.0, -4.0])
    assert metrics["loss"].item() == total


def test_untrained_policy_has_the_loss_of_a_coin_flip():
    total, metrics, _ = one_pair(0.0, 0.0, 0.1, "sigmoid")
    assert total == pytest.approx(0.693147, abs=1e-6)
    assert metrics["dpo/accuracy"].item() == 0.0


def test_a_wrong_order_is_not_accurate():
    _, metrics, gradients = one_pair(-1.0, 1.0, 0.1, "sigmoid")
    assert metrics["dpo/accuracy"].item() == 0.0
    assert gradients[0] < 0 < gradients[1]


@pytest.mark.parametrize("h", [-1e4, 1e4])
def test_a_far_off_pair_stays_finite(h: float):
    total, _, gradients = one_pair(h, 0.0, 1.0, "sigmoid")
    assert total == pytest.approx(max(-h, 0.0))
    assert gradients[0] == pytest.approx(-1.0 if h < 0 else 0.0)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("rubbish", [0.0, -1e3])
def test_padding_pairs_change_nothing(loss: str, rubbish: float):
    real = pairs(3)
    padded = [torch.cat([t, torch.full((2,), rubbish * (i + 1))]) for i, t in enumerate(real)]
    keys = {"beta": 0.1, "loss": loss, "num_pairs": 3}
    total, metrics = online_dpo_loss(*real, torch.ones(3), **keys)
    padded_total, padded_metrics = online_dpo_loss(*padded, torch.tensor([1.0, 1, 1, 0, 0]), **keys)
    torch.testing.assert_close(padded_total, total, rtol=1e-6, atol=0)
    for name in metrics:
        torch.testing.assert_close(padded_metrics[name], metrics[name], rtol=1e-6, atol=0)
    expected = torch.autograd.grad(total, real[:2])
    for ours, theirs in zip(torch.autograd.grad(padded_total, real[:2]), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_micro_batches_with_the_step_s_pair_count_add_up(loss: str):
    tensors = pairs(5)
    whole, metrics = online_dpo_loss(*tensors, torch.ones(5), beta=0.1, loss=loss, num_pairs=5)
    parts = [
        online_dpo_loss(*(t[rows] for t in tensors), torch.ones(len(rows)), beta=0.1, loss=loss, num_pairs=5)
        for rows in ([0, 3], [1, 2, 4])
    ]
    torch.testing.assert_close(sum(total for total, _ in parts), whole, rtol=1e-6, atol=0)
    for name, value in metrics.items():
        torch.testing.assert_close(sum(part[name] for _, part in parts), value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_metrics_carry_no_gradient(loss: str):
    _, metrics = online_dpo_loss(*pairs(2), torch.ones(2), beta=0.1, loss=loss, num_pairs=2)
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_is_the_derivative(loss: str):
    tensors = pairs(4, dtype=torch.float64)
    weight_P = torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64)

    def total(chosen_P: torch.Tensor, rejected_P: torch.Tensor) -> torch.Tensor:
        return online_dpo_loss(chosen_P, rejected_P, *tensors[2:], weight_P, beta=0.1, loss=loss, num_pairs=3)[0]

    assert torch.autograd.gradcheck(total, tuple(tensors[:2]))


EOS = 1
LENGTHS = [5, 1, 8, 3, 2, 8]  # ragged: two completions each of three prompts, first halves then second halves
REWARDS = [1.0, 0.0, 0.5, 0.0, 1.0, 0.2]


def trl_step(logprobs_BT, reference_BT, mask_BT, loss: str, beta: float) -> tuple[torch.Tensor, dict]:
    """TRL's own `training_step` on given log-probabilities: only generating and running the model are left out."""
    online_dpo_trainer = pytest.importorskip("trl.experimental.online_dpo.online_dpo_trainer", exc_type=ImportError)

    class GivenLogprobs(online_dpo_trainer.OnlineDPOTrainer):
        def __init__(self):  # the parent's wants a model, a tokenizer and a dataset
            self._beta = beta
            self.args = SimpleNamespace(
                loss_type=loss, use_vllm=False, missing_eos_penalty=None, torch_empty_cache_steps=None,
                optim="adamw_torch", n_gpu=1, gradient_accumulation_steps=1,
            )  # fmt: skip
            self.eos_token_ids = [EOS]
            self.ref_model = "reference"
            self.reward_funcs = ["given"]
            self.stats = defaultdict(list)
            self.processing_class = SimpleNamespace(batch_decode=lambda ids, **_: ["" for _ in ids])
            self.accelerator = SimpleNamespace(backward=lambda loss: loss.backward(), gather_for_metrics=lambda x: x)

        def _generate(self, model, prompts, images=None):
            ids_BT = torch.full(mask_BT.shape, EOS)
            return None, None, ids_BT, mask_BT.long(), None

        def _forward(self, model, *_):
            return reference_BT if model == "reference" else logprobs_BT

        def _calculate_rewards_from_functions(self, **_):
            return torch.tensor(REWARDS)

    trainer = GivenLogprobs()
    model = SimpleNamespace(train=lambda: None)
    total = trainer.training_step(model, {"prompt": ["a", "b", "c"]})
    return total, {name: values[0] for name, values in trainer.stats.items()}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("beta", [0.03, 0.1, 1.0])
@pytest.mark.filterwarnings("ignore")
def test_loss_gradients_and_metrics_equal_trl(loss: str, beta: float):
    generator = torch.Generator().manual_seed(3)
    logprobs_BT, reference_BT = (-3 * torch.rand(6, 8, generator=generator) for _ in range(2))
    mask_BT = torch.tensor([[float(t < length) for t in range(8)] for length in LENGTHS])
    theirs_BT, ours_BT = logprobs_BT.clone().requires_grad_(), logprobs_BT.clone().requires_grad_()

    theirs, stats = trl_step(theirs_BT, reference_BT, mask_BT, loss, beta)

    policy_B, reference_B = (ours_BT * mask_BT).sum(-1), (reference_BT * mask_BT).sum(-1)
    chosen, rejected = [0, 4, 2], [3, 1, 5]
    ours, metrics = online_dpo_loss(
        policy_B[chosen], policy_B[rejected], reference_B[chosen], reference_B[rejected], torch.ones(3),
        beta=beta, loss=loss, num_pairs=3,
    )  # fmt: skip
    ours.backward()

    torch.testing.assert_close(ours.detach(), theirs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours_BT.grad, theirs_BT.grad, rtol=1e-5, atol=1e-7)
    assert metrics["dpo/margin"].item() == pytest.approx(stats["rewards/margins"], rel=1e-5)
    assert metrics["dpo/accuracy"].item() == pytest.approx(stats["rewards/accuracies"], rel=1e-6)
    assert metrics["dpo/chosen_ratio"].item() == pytest.approx(stats["rewards/chosen"], rel=1e-5)
    assert metrics["dpo/rejected_ratio"].item() == pytest.approx(stats["rewards/rejected"], rel=1e-5)
