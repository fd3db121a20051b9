"""Which keys of an algorithm go together, and what the learner has to do for them."""

import pytest

from megatron_async_rlhf.config.load import dump_config, load_config
from megatron_async_rlhf.errors import ConfigError


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        (
            {"type": "rloo", "correction": {"type": "mask"}},
            "algorithm.type = rloo is of whole completions: set algorithm.correction.type = mask_sequences",
        ),
        (
            {"type": "proximal_rloo", "correction": {"type": "mask"}},
            "algorithm.type = proximal_rloo is of whole completions: set algorithm.correction.type = mask_sequences",
        ),
        ({"type": "rloo", "ratio_base": "sampler"}, "algorithm.ratio_base = sampler: no such key"),
        ({"type": "ppo", "score_after_end": True}, "algorithm.score_after_end = true: no such key"),
        ({"type": "ppo", "dual_clip": 1.2}, "algorithm.dual_clip = 1.2 must be above 1 + algorithm.clip_high = 1.2"),
        ({"type": "grpo", "dual_clip": 1.1}, "algorithm.dual_clip = 1.1 must be above"),
        ({"type": "grpo", "loss": "cispo", "clip_high": 0.28}, "algorithm.clip_high = 0.28 has no meaning with"),
        ({"type": "grpo", "loss": "cispo", "dual_clip": 4}, "algorithm.dual_clip = 4.0 has no meaning with"),
        ({"type": "grpo", "loss": "cispo", "ratio": "sequence"}, "algorithm.ratio = sequence has no meaning with"),
        ({"type": "grpo", "kl": {"estimator": "k1"}}, "algorithm.kl.estimator = k1: its own gradient is zero"),
        (
            {"type": "ppo", "kl": {"gradient": "estimator", "estimator": "k3"}},
            "algorithm.kl.gradient = estimator is of a term of the loss: set algorithm.kl.place = loss",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(load, algorithm: dict, message: str):
    with pytest.raises(ConfigError) as refused:
        load(algorithm=algorithm)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "algorithm",
    [
        {"type": "rloo", "correction": {"type": "truncate"}},
        {"type": "proximal_rloo", "correction": {"type": "mask_sequences"}},
        {"type": "ppo", "dual_clip": 1.3, "value_hf": "some/where"},
        {"type": "grpo", "loss": "cispo", "ratio_base": "sampler"},
        {"type": "grpo", "kl": {"estimator": "k1", "gradient": "policy"}},
        {"type": "rloo", "kl": {"place": "loss", "estimator": "k3", "gradient": "estimator"}},
    ],
)
def test_what_makes_sense_survives_a_dump(load, tmp_path, algorithm: dict):
    config = load(algorithm=algorithm)
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize(("name", "level"), [("rloo", "sequence"), ("proximal_rloo", "sequence"), ("grpo", "token")])
def test_a_correction_is_of_what_the_loss_is_of(load, name: str, level: str):
    assert load(algorithm={"type": name, "correction": {"type": "truncate"}}).algorithm.correction_level == level


@pytest.mark.parametrize(
    ("algorithm", "needed"),
    [
        ({"type": "online_dpo"}, (2, 2, True, False)),
        ({"type": "best_of_n", "samples_per_prompt": 4}, (1, 1, False, False)),
        ({"type": "rloo", "samples_per_prompt": 4}, (4, 1, True, False)),
        ({"type": "grpo", "kl": {"coefficient": 0}}, (8, 1, False, False)),
        ({"type": "ppo"}, (1, 1, True, True)),
    ],
)
def test_what_an_algorithm_needs(load, algorithm: dict, needed: tuple):
    section = load(algorithm=algorithm).algorithm
    assert needed == (
        section.trained_samples, section.sequences_together, section.has_reference, section.has_value_model,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("algorithm", "with_one_update", "with_several"),
    [
        ({"type": "online_dpo"}, False, False),
        ({"type": "rloo", "kl": {"coefficient": 0}}, False, False),
        ({"type": "rloo", "kl": {"coefficient": 0}, "correction": {"type": "truncate"}}, False, True),
        ({"type": "rloo"}, True, True),  # the KL of the reward is the proximal policy's
        ({"type": "ppo", "kl": {"place": "loss"}}, False, True),
        ({"type": "grpo"}, False, True),
        ({"type": "grpo", "ratio_base": "sampler"}, False, False),
        ({"type": "proximal_rloo", "ratio_base": "sampler"}, True, True),
    ],
)
def test_the_proximal_policy_is_scored_only_if_the_training_pass_does_not(
    load, algorithm: dict, with_one_update: bool, with_several: bool
):
    section = load(algorithm=algorithm).algorithm
    assert (section.scores_policy_first(1), section.scores_policy_first(2)) == (with_one_update, with_several)
