import pytest

from megatron_async_rlhf.config.warnings import config_warnings


@pytest.mark.parametrize("name", ["ppo", "rloo", "proximal_rloo", "grpo"])
@pytest.mark.parametrize("bound", [1, 4, None])
def test_a_ratio_without_correction_is_named(load, name: str, bound):
    schedule = {"max_staleness": bound, "generation": "streaming", "max_groups": 64}
    (line,) = config_warnings(load(algorithm={"type": name}, schedule=schedule))
    assert (
        f"algorithm.type = {name}" in line
        and "schedule.max_staleness = " + ("null" if bound is None else str(bound)) in line
    )
    assert "algorithm.correction.type" in line


@pytest.mark.parametrize(
    "algorithm",
    [
        {"type": "ppo", "correction": {"type": "decoupled"}},
        {"type": "grpo", "correction": {"type": "mask"}},
        {"type": "proximal_rloo", "ratio_base": "sampler"},
        {"type": "online_dpo"},
        {"type": "best_of_n"},
    ],
)
def test_what_stands_staleness_is_not_warned_of(load, algorithm: dict):
    assert config_warnings(load(algorithm=algorithm, schedule={"max_staleness": 4})) == []


@pytest.mark.parametrize("schedule", [{"mode": "sync", "max_staleness": 4}, {"max_staleness": 0}])
def test_without_staleness_there_is_nothing_to_correct(load, schedule: dict):
    assert config_warnings(load(algorithm={"type": "ppo"}, schedule=schedule)) == []


def test_updates_in_flight_need_staleness(load):
    schedule = {"max_staleness": 0, "generation": "streaming", "in_flight_updates": "keep"}
    (line,) = config_warnings(load(schedule=schedule))
    assert "schedule.in_flight_updates = keep" in line
