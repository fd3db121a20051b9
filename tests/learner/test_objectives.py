"""Every algorithm has an objective of its own; nothing is trained with another's loss because nobody said with which."""

from pathlib import Path

import pytest
import torch

from megatron_async_rlhf.algorithms.corrections import correction_weights
from megatron_async_rlhf.algorithms.kl import kl_estimate, kl_loss
from megatron_async_rlhf.algorithms.normalisation import token_weights
from megatron_async_rlhf.algorithms.online_dpo import online_dpo_loss
from megatron_async_rlhf.algorithms.ratios import policy_log_ratio
from megatron_async_rlhf.algorithms.segments import Segments
from megatron_async_rlhf.config.algorithm_keys import AlgorithmKeys
from megatron_async_rlhf.config.algorithms import SECTIONS
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import LearnerError
from megatron_async_rlhf.learner.megatron.objectives.choose import choose_objective
from megatron_async_rlhf.learner.megatron.objectives.grpo import GRPO
from megatron_async_rlhf.learner.megatron.objectives.ppo import PPO
from megatron_async_rlhf.learner.megatron.objectives.preferences import BestOfN, OnlineDPO
from megatron_async_rlhf.learner.megatron.objectives.rloo import RLOO, ProximalRLOO
from megatron_async_rlhf.learner.megatron.objectives.user_loss import user_loss

OBJECTIVES = {
    "online_dpo": OnlineDPO,
    "ppo": PPO,
    "rloo": RLOO,
    "proximal_rloo": ProximalRLOO,
    "best_of_n": BestOfN,
    "grpo": GRPO,
}
MODEL = {"layers": 2, "hidden_size": 64, "ffn_size": 96, "heads": 2, "context_length": 96}
ROW = torch.zeros(4)
MASK = torch.ones(4, dtype=torch.bool)
SPANS = Segments(mask_T=MASK, segments_T=torch.zeros(4, dtype=torch.long), count=1)
# What each key that chooses a formula does with a value that nobody has written a formula for.
CHOICES = {
    "kl.estimator": lambda: kl_estimate(ROW, "k4"),
    "kl.gradient": lambda: kl_loss(ROW, ROW, ROW, MASK, None, estimator="k1", gradient="new", num_tokens=4),
    "correction.type": lambda: correction_weights(ROW, MASK, kind="new", count=4),
    "normalisation": lambda: token_weights(SPANS, "new", num_tokens=4, num_sequences=1),
    "ratio": lambda: policy_log_ratio(ROW, ROW, SPANS, "new"),
    "loss": lambda: online_dpo_loss(ROW, ROW, ROW, ROW, ROW, beta=0.1, loss="new", num_pairs=4),
}


def config(algorithm: str) -> RunConfig:
    return RunConfig.model_validate({"model": MODEL, "algorithm": {"type": algorithm}})


@pytest.mark.parametrize("algorithm", SECTIONS)
def test_every_algorithm_has_its_objective(algorithm: str):
    assert type(choose_objective(config(algorithm))) is OBJECTIVES[algorithm]


@pytest.mark.parametrize("algorithm", SECTIONS)
def test_of_every_algorithm_it_is_said_which_samples_it_trains_on(algorithm: str):
    section = config(algorithm).algorithm
    rewards = [float(k) for k in range(section.samples_per_prompt)]
    assert len(section.chosen_samples(rewards)) == section.trained_samples


def test_an_algorithm_that_says_too_little_of_itself_is_refused():
    class Newcomer(AlgorithmKeys):
        type: str = "newcomer"

    with pytest.raises(TypeError, match="chosen_samples"):
        Newcomer()
    Newcomer.chosen_samples = lambda self, rewards: [0]
    Newcomer.__abstractmethods__ = frozenset()
    with pytest.raises(AttributeError, match="objective"):
        choose_objective(config("ppo").model_copy(update={"algorithm": Newcomer()}))


@pytest.mark.parametrize("choice", CHOICES)
def test_a_formula_that_does_not_exist_is_no_other_one(choice: str):
    with pytest.raises(AssertionError, match="unreachable"):
        CHOICES[choice]()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("raises", r"raised IndexError: no such thing \(own_losses.py, line \d+\)"),
        ("no_pair", "returned no pair of a loss and its metrics"),
        ("no_gradient", "returned a loss that is no scalar with a gradient"),
        ("no_scalar", "returned a metric own that is no scalar tensor"),
        ("no_metrics", "returned NoneType in place of a dictionary of metrics"),
        ("no_such_reduction", "returned a metric own that is to be reduced by 'avg'; there are sum, mean, max, min"),
        ("no_name", r"returned a metric called 7, which is no name for one of its own; call it own/\.\.\."),
        ("a_name_of_others", "returned a metric called 'tokens', which"),
        ("absent", "cannot be loaded: .*own_losses.py has no absent"),
    ],
)
def test_what_a_loss_of_ones_own_does_wrong_is_one_line(name: str, says: str):
    function = f"{Path(__file__).with_name('own_losses.py')}:{name}"
    logprobs = torch.full((4,), -1.0, requires_grad=True)
    with pytest.raises(LearnerError, match=f"algorithm.loss_function = .*{name} {says}") as failed:
        user_loss(function, {})(logprobs, ROW, ROW, ROW, SPANS, num_tokens=4)
    assert "\n" not in str(failed.value)
