"""What a resumed run may change of its rewards: how they are computed, not what a completion earns."""

import pytest

from megatron_async_rlhf.config.resume import check_same_run
from megatron_async_rlhf.config.rewards import REWARDS
from megatron_async_rlhf.errors import ConfigError

JUDGE = {"type": "judge", "url": "http://localhost:8000/v1", "model": "m"}
FUNCTION = {"type": "function", "function": "own.py:score"}


def check(load, before: object, now: object) -> None:
    data = {"train": "prompts.jsonl"}
    check_same_run(load(data=data, reward=before), load(data=data, reward=now))


@pytest.mark.parametrize(
    ("reward", "key", "value"),
    [
        (JUDGE, "budget", {"max_calls": 5}),
        (JUDGE, "url", "http://elsewhere/v1"),
        (JUDGE, "concurrency", 3),
        (FUNCTION, "timeout_s", 90.0),
        (FUNCTION, "workers", 5),
        (FUNCTION, "on_error", "zero"),
        ({"type": "ifeval"}, "timeout_s", 90.0),
    ],
)
def test_how_a_reward_is_computed_may_change(load, reward: dict, key: str, value: object):
    check(load, reward, reward | {key: value})
    check(
        load, [{"type": "length", "per_token": 1}, reward], [{"type": "length", "per_token": 1}, reward | {key: value}]
    )


def test_what_it_earns_may_not_and_is_named(load):
    with pytest.raises(ConfigError, match="^reward.model = n: the run in .* was started with m; set that again"):
        check(load, JUDGE, JUDGE | {"model": "n"})
    with pytest.raises(ConfigError, match="^reward.0.weight = 2.0: the run in .* was started with 1.0"):
        check(load, [JUDGE, FUNCTION], [JUDGE | {"weight": 2.0}, FUNCTION])
    with pytest.raises(ConfigError, match="^reward"):
        check(load, [JUDGE, FUNCTION], [JUDGE])
    with pytest.raises(ConfigError, match="^reward"):
        check(load, FUNCTION, [FUNCTION])


def test_what_may_change_are_keys():
    assert all(set(section.may_change) <= set(section.model_fields) for section in REWARDS.values())
