import math

import pytest

from megatron_async_rlhf.config.algorithms import SECTIONS
from megatron_async_rlhf.config.load import dump_config
from megatron_async_rlhf.errors import ConfigError


@pytest.mark.parametrize("name", SECTIONS)
def test_every_algorithm_has_a_section_that_survives_a_dump(load, tmp_path, name: str):
    config = load(algorithm={"type": name})
    assert config.algorithm.type == name
    (tmp_path / "again.yaml").write_text(dump_config(config))
    from megatron_async_rlhf.config.load import load_config

    assert load_config(tmp_path / "again.yaml") == config


def test_online_dpo_is_what_nobody_has_to_name(load):
    assert load(algorithm={"beta": 0.03}).algorithm.type == "online_dpo"


def test_the_keys_of_the_paper_are_defaults(load):
    ppo = load(algorithm={"type": "ppo"}).algorithm
    assert (ppo.gamma, ppo.gae_lambda, ppo.value_coefficient, ppo.value_clip) == (1.0, 0.95, 0.1, 0.2)
    assert (ppo.clip_low, ppo.clip_high, ppo.kl.coefficient, ppo.kl.place) == (0.2, 0.2, 0.05, "reward")
    assert load(algorithm={"type": "grpo", "kl": {"coefficient": 0.1}}).algorithm.kl.place == "loss"


@pytest.mark.parametrize(
    ("keys", "kind", "level", "bounds"),
    [
        ({"type": "decoupled"}, "truncate", "token", (0, math.inf)),
        ({"type": "truncate"}, "truncate", "token", (0, 2)),
        ({"type": "truncate", "high": 8}, "truncate", "token", (0, 8)),
        ({"type": "mask"}, "mask", "token", (0.5, 5)),
        ({"type": "mask", "low": 0.9, "high": 1.1}, "mask", "token", (0.9, 1.1)),
        ({"type": "mask_sequences"}, "mask", "sequence", (0, 2)),
    ],
)
def test_a_correction_by_name(load, keys: dict, kind: str, level: str, bounds: tuple):
    correction = load(algorithm={"type": "grpo", "correction": keys}).algorithm.correction
    assert (correction.kind, correction.level, correction.bounds) == (kind, level, bounds)


def test_a_rollout_is_mini_batches_times_epochs(load):
    schedule = load(schedule={"mini_batches": 4, "epochs": 2, "steps": 24, "max_staleness": 8}).schedule
    assert (schedule.updates_per_rollout, schedule.groups_per_rollout, schedule.rollouts) == (8, 4 * 32, 3)


@pytest.mark.parametrize(("value", "meant"), [(True, "keep"), (False, "none"), ("recompute", "recompute")])
def test_updates_in_flight_by_name_or_by_switch(load, value, meant: str):
    schedule = {"generation": "streaming", "in_flight_updates": value}
    assert load(schedule=schedule).schedule.in_flight_updates == meant


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"algorithm": {"type": "dpo"}}, r"algorithm.type = dpo: must be one of online_dpo, ppo"),
        ({"algorithm": 3}, r"algorithm = 3: must be a section"),
        (
            {"algorithm": {"type": "ppo", "beta": 1}},
            r"algorithm.beta = 1: no such key; it goes with algorithm.type = online_dpo, not ppo",
        ),
        (
            {"algorithm": {"type": "ppo", "kl": {"foo": 1}}},
            r"algorithm.kl.foo = 1: no such key; .*: coefficient, place",
        ),
        ({"algorithm": {"type": "rloo", "samples_per_prompt": 1}}, r"algorithm.samples_per_prompt = 1: .* 2"),
        ({"algorithm": {"type": "grpo", "kl": {"place": "reward"}}}, r"algorithm.kl.place = reward: .*'loss'"),
        (
            {"algorithm": {"type": "ppo", "correction": {"type": "decoupled", "high": 2}}},
            r"algorithm.correction.type = decoupled has no low and high",
        ),
        (
            {"algorithm": {"type": "ppo", "correction": {"type": "mask", "low": 6}}},
            r"correction.low = 6 is above algorithm.correction.high = 5",
        ),
        (
            {"algorithm": {"type": "ppo", "ratio_base": "sampler", "correction": {"type": "mask"}}},
            r"algorithm.correction.type = mask .* algorithm.ratio_base = sampler nothing is left",
        ),
        ({"schedule": {"steps": 10, "mini_batches": 4}}, r"steps = 10 is not a multiple of mini_batches x epochs = 4"),
        ({"schedule": {"epochs": 2, "max_staleness": 3}}, r"max_staleness = 3 is not a multiple of .* = 2"),
        ({"schedule": {"order": "freshest"}}, r"schedule.order = freshest needs schedule.generation = streaming"),
        ({"schedule": {"in_flight_updates": True}}, r"in_flight_updates = keep needs schedule.generation = streaming"),
        ({"schedule": {"max_staleness": None}}, r"max_staleness = null needs schedule.generation = streaming"),
        (
            {"schedule": {"max_staleness": None, "generation": "streaming"}},
            r"max_staleness = null needs schedule.max_groups",
        ),
        (
            {"schedule": {"generation": "streaming", "max_groups": 31}},
            r"max_groups = 31 is below the 32 groups of one rollout",
        ),
        ({"schedule": {"generation": "streaming", "window": 64}}, r"schedule.window needs schedule.order = windowed"),
        (
            {"schedule": {"generation": "streaming", "order": "windowed", "window": 8}},
            r"window = 8 is below the 32 groups",
        ),
        (
            {"schedule": {"mini_batches": 2, "max_staleness": 2}, "checkpoint": {"every_steps": 3}},
            r"checkpoint.every_steps = 3 is not a multiple of .* = 2",
        ),
        (
            {"schedule": {"mini_batches": 2, "max_staleness": 2, "eval_every": 3}},
            r"schedule.eval_every = 3 is not a multiple",
        ),
    ],
)
def test_what_makes_no_sense_is_one_line(load, sections: dict, message: str):
    with pytest.raises(ConfigError, match=message) as refused:
        load(**sections)
    assert "\n" not in str(refused.value)
