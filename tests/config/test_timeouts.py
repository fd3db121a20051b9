"""A timeout below what those that wait for each other can meet is refused."""

import pytest

from megatron_async_rlhf.config.beats import IDLE_BEAT_S, NODE_BEAT_S
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.launch import agent, fleet


@pytest.mark.parametrize("value", ["0.5", "4", "5", "9.9"])
def test_idle_ranks_hear_from_rank_0_before_they_give_up(load, value: str):
    with pytest.raises(ConfigError) as refused:
        load("weights.timeout_s=0.1", f"learner.timeout_s={value}")
    shown = f"{float(value)}" if "." in value else value
    assert str(refused.value) == (
        f"learner.timeout_s = {shown}: must be at least 10: ranks without work hear from rank 0 every 5 s"
    )
    assert load("weights.timeout_s=5", "learner.timeout_s=10").learner.timeout_s == 2 * IDLE_BEAT_S


@pytest.mark.parametrize("value", ["0.2", "1", "2.9"])
def test_machines_hear_from_each_other_before_they_give_up(load, value: str):
    with pytest.raises(ConfigError, match="must be at least 3: machines hear from each other every 1 s"):
        load(f"launch.node_timeout_s={value}")
    assert load("launch.node_timeout_s=3").launch.node_timeout_s == 3 * NODE_BEAT_S


def test_these_are_the_beats_that_are_kept():
    assert agent.BEAT_S == fleet.BEAT_S == NODE_BEAT_S
