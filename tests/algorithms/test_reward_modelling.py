from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from megatron_async_rlhf.algorithms.reward_modelling import bradley_terry_loss


def rewards(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Chosen, rejected (with gradients) and margins, float64."""
    generator = torch.Generator().manual_seed(seed)
    chosen_P, rejected_P, margin_P = (2 * torch.randn(count, generator=generator).double() for _ in range(3))
    return chosen_P.requires_grad_(), rejected_P.requires_grad_(), margin_P.abs()


def one_pair(chosen: float, rejected: float, margin: float | None, center: float):
    values = [torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in (chosen, rejected)]
    margin_P = None if margin is None else torch.tensor([margin], dtype=torch.float64)
    total, metrics = bradley_terry_loss(
        *values, torch.ones(1), margin_P=margin_P, center_coefficient=center, num_pairs=1
    )
    return total.item(), metrics, [gradient.item() for gradient in torch.autograd.grad(total, values)]


def test_by_hand():
    # r_chosen - r_rejected = 2: -log(1 / (1 + e^-2)) = 0.126928; slope sigmoid(2) - 1 = -0.119203
    total, metrics, gradients = one_pair(1.5, -0.5, None, 0.0)
    assert total == pytest.approx(0.126928, abs=1e-6)
    assert gradients == pytest.approx([-0.119203, 0.119203], abs=1e-6)
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
        {
            "loss": total,
            "pairs/accuracy": 1.0,
            "pairs/margin": 2.0,
            "pairs/chosen_reward": 1.5,
            "pairs/rejected_reward": -0.5,
        }
    )


def test_a_margin_is_taken_from_the_difference():
    # 2 - 3 = -1: log(1 + e^1) = 1.313262; slope sigmoid(-1) - 1 = -0.731059. The margin reported is that of the rewards.
    total, metrics, gradients = one_pair(1.5, -0.5, 3.0, 0.0)
    assert total == pytest.approx(1.313262, abs=1e-6)
    assert gradients == pytest.approx([-0.731059, 0.731059], abs=1e-6)
    assert (metrics["pairs/margin"].item(), metrics["pairs/accuracy"].item()) == (2.0, 1.0)


def test_centring_draws_the_sum_of_both_rewards_to_zero():
    # 0.126928 + 0.25 (1.5 - 0.5)^2; its slope 2 x 0.25 x 1 is the same for both
    total, _, gradients = one_pair(1.5, -0.5, None, 0.25)
    assert total == pytest.approx(0.376928, abs=1e-6)
    assert gradients == pytest.approx([-0.119203 + 0.5, 0.119203 + 0.5], abs=1e-6)


def test_equal_rewards_cost_as_a_coin_flip_and_are_not_accurate():
    total, metrics, _ = one_pair(0.7, 0.7, None, 0.0)
    assert total == pytest.approx(0.693147, abs=1e-6)
    assert metrics["pairs/accuracy"].item() == 0.0


@pytest.mark.parametrize("apart", [-1e4, 1e4])
def test_a_far_off_pair_stays_finite(apart: float):
    total, _, gradients = one_pair(apart, 0.0, None, 0.0)
    assert total == pytest.approx(max(-apart, 0.0))
    assert gradients == pytest.approx([-1.0, 1.0] if apart < 0 else [0.0, 0.0])


def test_padding_pairs_change_nothing():
    chosen_P, rejected_P, margin_P = rewards(3)
    keys = {"center_coefficient": 0.1, "num_pairs": 3}
    total, metrics = bradley_terry_loss(chosen_P, rejected_P, torch.ones(3), margin_P=margin_P, **keys)
    padded = [torch.cat([part, torch.tensor([-7.0, 9.0])]) for part in (chosen_P, rejected_P, margin_P)]
    padded_total, padded_metrics = bradley_terry_loss(
        *padded[:2], torch.tensor([1.0, 1, 1, 0, 0]), margin_P=padded[2], **keys
    )
    torch.testing.assert_close(padded_total, total)
    torch.testing.assert_close(padded_metrics, metrics)
    expected = torch.autograd.grad(total, [chosen_P, rejected_P])
    torch.testing.assert_close(torch.autograd.grad(padded_total, [chosen_P, rejected_P]), expected)


def test_micro_batches_with_the_step_s_pair_count_add_up():
    chosen_P, rejected_P, margin_P = rewards(5)
    whole, metrics = bradley_terry_loss(chosen_P, rejected_P, torch.ones(5), margin_P=margin_P, num_pairs=5)
    parts = [
        bradley_terry_loss(
            chosen_P[rows], rejected_P[rows], torch.ones(len(rows)), margin_P=margin_P[rows], num_pairs=5
        )
        for rows in ([0, 3], [1, 2, 4])
    ]
    torch.testing.assert_close(sum(total for total, _ in parts), whole)
    for name, value in metrics.items():
        torch.testing.assert_close(sum(part[name] for _, part in parts), value)
        assert not value.requires_grad


def test_gradient_is_the_derivative():
    chosen_P, rejected_P, margin_P = rewards(4)
    weight_P = torch.tensor([1.0, 1, 0, 1])

    def total(chosen_P: torch.Tensor, rejected_P: torch.Tensor) -> torch.Tensor:
        keys = {"margin_P": margin_P, "center_coefficient": 0.03, "num_pairs": 3}
        return bradley_terry_loss(chosen_P, rejected_P, weight_P, **keys)[0]

    assert torch.autograd.gradcheck(total, (chosen_P, rejected_P))


@pytest.mark.parametrize("center", [None, 0.05])
@pytest.mark.parametrize("with_margin", [False, True])
def test_the_loss_and_metrics_are_those_of_trl(center: float | None, with_margin: bool):
    """TRL's own `compute_loss` on given rewards: only running the model is left out."""
    trainer = pytest.importorskip("trl.trainer.reward_trainer", exc_type=ImportError)
    chosen_P, rejected_P, margin_P = rewards(6, seed=3)

    class GivenRewards(trainer.RewardTrainer):
        def __init__(self):  # the parent's wants a model, a tokenizer and a dataset
            self.model = SimpleNamespace(training=True)
            self.args = SimpleNamespace(center_rewards_coefficient=center)
            self.accelerator = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x)
            self._metrics = defaultdict(lambda: defaultdict(list))
            self._total_train_tokens, self._tp_size = 0, 1

    theirs = GivenRewards()
    inputs = {"attention_mask": torch.ones(12, 1)} | ({"margin": margin_P} if with_margin else {})

    def model(**_):
        return SimpleNamespace(logits=torch.cat([chosen_P, rejected_P]).unsqueeze(1))

    expected = theirs.compute_loss(model, inputs)
    ours, metrics = bradley_terry_loss(
        chosen_P,
        rejected_P,
        torch.ones(6),
        margin_P=margin_P if with_margin else None,
        center_coefficient=center or 0.0,
        num_pairs=6,
    )
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
    of_trl = torch.autograd.grad(expected, [chosen_P, rejected_P])
    torch.testing.assert_close(torch.autograd.grad(ours, [chosen_P, rejected_P]), of_trl, rtol=1e-12, atol=0)
    reported = {name: values[0] for name, values in theirs._metrics["train"].items() if isinstance(values, list)}
    assert metrics["pairs/accuracy"].item() == pytest.approx(reported["accuracy"])
    assert metrics["pairs/margin"].item() == pytest.approx(reported["margin"])
    mean = (metrics["pairs/chosen_reward"] + metrics["pairs/rejected_reward"]) / 2
    assert mean.item() == pytest.approx(reported["mean_reward"])
