"""A thousand runs of the real scheduler in virtual time: none stops, none breaks a promise."""

from random import Random

import pytest
from random_schedules import random_config, random_scenario

from megatron_async_rlhf.simulate.simulation import simulate

BLOCKS, PER_BLOCK = 10, 100


@pytest.mark.parametrize("block", range(BLOCKS))
def test_every_promise_is_kept_on_every_schedule(block):
    for seed in range(block * PER_BLOCK, (block + 1) * PER_BLOCK):
        random = Random(f"schedule {seed}")
        config, scenario = random_config(random), random_scenario(random, seed)
        try:
            outcome = simulate(config, scenario)
        except BaseException as error:
            error.add_note(f"seed {seed}: {config.schedule}\n{scenario}")
            raise
        assert outcome.totals.steps == config.schedule.steps
