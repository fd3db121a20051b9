"""Crashes, hangs and returns of generators, as planned or at random."""

import asyncio
from collections.abc import Sequence
from random import Random

from megatron_async_rlhf.simulate.generator import SimulatedGenerator
from megatron_async_rlhf.simulate.scenario import Fault, Scenario


async def inject_faults(scenario: Scenario, generators: Sequence[SimulatedGenerator]) -> None:
    """All that befalls the generators; for ever, if there are random crashes."""
    async with asyncio.TaskGroup() as tasks:
        for fault in scenario.faults:
            tasks.create_task(_once(fault, generators[fault.generator]))
        if scenario.crashes_per_hour:
            for generator in generators:
                tasks.create_task(_crash_repeatedly(scenario, generator))


async def _once(fault: Fault, generator: SimulatedGenerator) -> None:
    await asyncio.sleep(fault.at)
    generator.back_s = fault.back_s
    if fault.kind in ("hang", "silent_engine"):
        generator.hang(engine_alone=fault.kind == "silent_engine")
        return
    generator.crash()
    await asyncio.sleep(fault.back_s)
    generator.restart(cut_off=fault.kind == "cut_off")


async def _crash_repeatedly(scenario: Scenario, generator: SimulatedGenerator) -> None:
    random = Random(f"{scenario.seed}/crashes of {generator.name}")
    while True:
        await asyncio.sleep(random.expovariate(scenario.crashes_per_hour / 3600))
        generator.crash()
        await asyncio.sleep(random.expovariate(1 / scenario.back_s))
        generator.restart()
