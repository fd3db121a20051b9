"""What the learner trains in the tests of algorithms: a configuration each, and rollouts that have all corner cases."""

import os
import random
from pathlib import Path

import torch
from learner_ranks import CONTEXT_LENGTH, REINFORCEMENT, TEMPERATURE, VOCAB_SIZE, Layout, write_hf_model
from plain_training import completion_logprobs
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

LEARNER = REINFORCEMENT | {"learning_rate": 6e-4, "min_learning_rate": 1e-4, "clip_grad": 1.5, "weight_decay": 0.1}
STEPS = 16  # of the learning-rate schedule
LONGEST = 20  # generator.max_new_tokens

# Two mini-batches, two epochs: a rollout is four updates. "once": each mini-batch is a rollout, and is used once.
CASES = {
    "online_dpo": {"algorithm": {"type": "online_dpo"}},
    "best_of_n": {"algorithm": {"type": "best_of_n"}},
    "rloo": {
        "algorithm": {"type": "rloo", "kl": {"coefficient": 0.3}, "correction": {"type": "truncate", "high": 1.2}},
    },
    "rloo_decoupled_once": {
        "algorithm": {
            "type": "rloo", "correction": {"type": "decoupled"},
            "kl": {"place": "loss", "estimator": "k2", "gradient": "estimator", "coefficient": 0.2},
        },
        "once": True,
    },
    "proximal_rloo": {"algorithm": {"type": "proximal_rloo", "kl": {"coefficient": 0.3}}},
    "proximal_rloo_sampler": {
        "algorithm": {
            "type": "proximal_rloo", "ratio_base": "sampler", "clip_high": 0.3,
            "kl": {"place": "loss", "estimator": "k3", "coefficient": 0.2},
        },
    },
    "ppo": {
        "algorithm": {
            "type": "ppo", "kl": {"coefficient": 0.3}, "correction": {"type": "truncate", "high": 1.1},
            "value_learning_rate": 3e-3,
        },
    },
    "ppo_value_hf_once": {
        "algorithm": {
            "type": "ppo", "gamma": 0.9, "gae_lambda": 0.5, "whiten_advantages": False, "value_clip": None,
            "dual_clip": 1.5, "value_coefficient": 0.5, "correction": {"type": "mask", "low": 0.8, "high": 1.25},
            "kl": {"place": "loss", "estimator": "k1", "coefficient": 0.2},
        },
        "once": True,
        "value_hf": True,
    },
    "grpo": {"algorithm": {"type": "grpo", "kl": {"coefficient": 0.3}, "correction": {"type": "mask", "low": 0.8}}},
    "grpo_sequences": {
        "algorithm": {
            "type": "grpo", "kl": {"coefficient": 0.0}, "ratio": "sequence", "normalisation": "token",
            "clip_low": 0.01, "clip_high": 0.02, "correction": {"type": "mask_sequences"},
        },
    },
    "grpo_cispo": {
        "algorithm": {
            "type": "grpo", "loss": "cispo", "normalisation": "constant", "scale_advantages": False,
            "ratio_base": "sampler", "cispo_high": 1.1,
        },
    },
}  # fmt: skip
# One sequence a micro-batch; data-parallel ranks then fill up with sequences that only keep them in step.
ALONE = {"ppo_alone": "ppo", "ppo_value_hf_once_alone": "ppo_value_hf_once", "rloo_alone": "rloo"}
# A prompt is computed once for the completions of it in a micro-batch.
SHARED = {"online_dpo_shared": "online_dpo", "ppo_shared": "ppo", "grpo_shared": "grpo"}
# The same loss from outside the package.
OWN = {"grpo_own_loss": "grpo"}
IN_LAYOUTS = ["grpo_own_loss", "rloo", "rloo_alone", "proximal_rloo", "ppo", "ppo_value_hf_once", "grpo"]
SAVED = ["rloo", "ppo", "ppo_value_hf_once"]  # a checkpoint of these is resumed from
ONE = Layout()
LAYOUTS = [
    Layout(tensor=2, sequence_parallel=True),
    Layout(data=2, distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True),
    Layout(pipeline=2),
    Layout(context=2, reference="swapped"),
]
if os.environ.get("ASYNC_RLHF_TEST_THOROUGH") != "1":
    LAYOUTS = LAYOUTS[:2]  # what differs for an algorithm is which rank holds which samples, and who reduces what


def cases_in(layout: Layout) -> list[str]:
    """A shared prompt needs whole sequences on a rank."""
    return [*IN_LAYOUTS, *(SHARED if layout.context == 1 else [])]


def write_models(root: Path) -> dict[str, str]:
    """A policy and a reward model of its shape but with other weights."""
    shape = {"family": "llama", "num_key_value_heads": 2}
    policy = write_hf_model(root / "policy", seed=21, **shape)
    torch.manual_seed(22)
    config = AutoConfig.from_pretrained(policy, num_labels=1)
    reward = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    reward.save_pretrained(root / "reward")
    return {"policy": str(policy), "reward": str(root / "reward")}


def make_group(dice: random.Random, lengths: list[int], rewards: list[float]) -> dict:
    prompt = [dice.randrange(VOCAB_SIZE) for _ in range(dice.randrange(1, 5))]
    rows = [(prompt + [dice.randrange(VOCAB_SIZE) for _ in range(length)], len(prompt)) for length in lengths]
    return {"sequences": rows, "rewards": rewards}


def make_rollouts(policy: str) -> list[list[list[dict]]]:
    """Groups by rollout and mini-batch. The sampler is near the policy that training starts from.

    Among them a group whose rewards are all the same, an empty completion, single tokens, a row as long as the context,
    a mini-batch without groups, one of a single group, and one with nothing but an empty completion and a single token.
    """
    dice = random.Random(3)

    def draw() -> dict:
        lengths = [dice.randrange(1, 16) for _ in range(3)]
        return make_group(dice, lengths, [dice.choice([-1.0, 0.25, 0.5, 2.0]) + 0.01 * k for k in range(3)])

    special = [
        make_group(dice, [4, 9, 2], [0.5, 0.5, 0.5]),
        make_group(dice, [0, 1, 7], [-1.0, 2.0, 0.25]),
        make_group(dice, [CONTEXT_LENGTH - 4, 3, 1], [1.0, -0.5, 0.0]),
    ]
    rollouts = [
        [[*special], [draw(), draw()]],
        [[draw(), draw(), draw()], [draw()]],
        [[], [make_group(dice, [0, 1, 1], [1.0, -1.0, 0.5]), draw()]],
    ]
    add_sampler(policy, [group for rollout in rollouts for groups in rollout for group in groups])
    return rollouts


@torch.no_grad()
def add_sampler(policy: str, groups: list[dict]) -> None:
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    torch.manual_seed(23)
    for group in groups:
        rows = [completion_logprobs(model, row, TEMPERATURE) for row in group["sequences"]]
        group["sampler"] = [(row + 0.15 * torch.randn(len(row))).clamp(max=-1e-3).tolist() for row in rows]


def rollouts_of(case: dict, rollouts: list) -> list[tuple[list[list[dict]], int]]:
    """Mini-batches and epochs of each command, as the algorithm wants its samples."""
    kind = case["algorithm"]["type"]

    def chosen(group: dict) -> dict:
        order = sorted(range(len(group["rewards"])), key=lambda k: -group["rewards"][k])
        kept = {"online_dpo": [order[0], order[-1]], "best_of_n": order[:1]}.get(kind, range(len(order)))
        return {key: [values[k] for k in kept] for key, values in group.items()}

    cut = [[[chosen(group) for group in groups] for groups in rollout] for rollout in rollouts]
    if case.get("once"):
        return [([groups], 1) for rollout in cut for groups in rollout]
    return [(rollout, 2) for rollout in cut]


def own_loss() -> dict:
    """Keys of the algorithm's section."""
    return {"loss_function": f"{Path(__file__).with_name('own_losses.py')}:clipped", "loss_kwargs": {"clip": 0.2}}


def section_of(case: dict, models: dict[str, str]) -> dict:
    """The case's algorithm section as a config has it."""
    return case["algorithm"] | ({"value_hf": models["reward"]} if case.get("value_hf") else {})
