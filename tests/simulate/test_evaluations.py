"""Evaluations among everything that can happen to them, in virtual time."""

import asyncio
from pathlib import Path

import pytest
from random_schedules import make_config

from megatron_async_rlhf.scheduler.state import BEGINNING, ControllerState
from megatron_async_rlhf.simulate.generator import SimulatedGenerator
from megatron_async_rlhf.simulate.invariants import HELD_OUT
from megatron_async_rlhf.simulate.lengths import ConstantLength
from megatron_async_rlhf.simulate.scenario import Fault, Scenario, Speeds
from megatron_async_rlhf.simulate.simulation import NoCheckpoints, Simulation
from megatron_async_rlhf.simulate.virtual_time import run_in_virtual_time


class OneCheckpoint(NoCheckpoints):
    """Keeps the state at one version."""

    def __init__(self, version: int) -> None:
        self.version, self.state = version, BEGINNING

    def is_due(self, version: int) -> bool:
        return version == self.version

    async def start(self, state: ControllerState) -> None:
        self.state = state


@pytest.mark.parametrize("saved_at", [2, 3, 4])
def test_a_resumed_run_evaluates_when_the_whole_run_does_and_among_the_same_prompts(tmp_path, monkeypatch, saved_at):
    """What shares a forward pass decides the last bits."""
    asked: list[tuple[int, int]] = []
    original = SimulatedGenerator.sample

    async def noted(self, request):
        asked.append((request.prompt.token_ids[0], request.order))
        return await original(self, request)

    monkeypatch.setattr(SimulatedGenerator, "sample", noted)
    config = make_config({"mode": "sync", "steps": 7, "prompts_per_step": 2, "eval_every": 2}, data={"eval_prompts": 3})

    def run(checkpoints: NoCheckpoints, state: ControllerState) -> list[str]:
        async def whole() -> list[str]:
            simulation = Simulation(config, Scenario(lengths=ConstantLength(8)), tmp_path, state=state)
            simulation.controller._checkpoints = checkpoints
            await simulation.run()
            return list(simulation.recorder.totals.evaluation)

        return run_in_virtual_time(whole(), patience_s=1e5)

    checkpoint = OneCheckpoint(saved_at)
    assert run(checkpoint, BEGINNING) == ["step 2", "step 4", "step 6"]
    whole = list(asked)
    asked.clear()
    rest = run(NoCheckpoints(), checkpoint.state)
    assert rest == [name for name in ("step 2", "step 4", "step 6") if int(name[5:]) >= saved_at]
    assert asked == whole[-len(asked) :]
    assert any(number >= HELD_OUT for number, _ in asked)


def evaluate_while(tmp_path: Path, scenario: Scenario, befall, **sections) -> dict[str, float]:
    """Held-out metrics after the last step, and what happens meanwhile: (seconds, what) in `befall`."""
    config = make_config(
        {"steps": 2, "prompts_per_step": 4, "eval_every": 1},
        generator={"max_new_tokens": 64, "eval_temperature": 0.5, **sections},
        data={"eval_prompts": 8},
    )

    async def whole() -> dict[str, float]:
        simulation = Simulation(config, scenario, tmp_path)
        await simulation.run()
        for seconds, what, number in befall:
            asyncio.get_running_loop().call_later(seconds, getattr(simulation.generators[number], what))
        await simulation.controller.evaluate("after")
        return simulation.recorder.totals.evaluation["after"]

    return run_in_virtual_time(whole(), patience_s=1e5)


def test_the_last_evaluation_outlives_all_its_generators(tmp_path):
    alone = Scenario(lengths=ConstantLength(40))
    calm = evaluate_while(tmp_path, alone, [])
    assert evaluate_while(tmp_path, alone, [(0.3, "crash", 0), (20.0, "restart", 0)]).keys() == calm.keys()
    # The first is back while the second works, and has nothing to do until that one is gone for good.
    two = Scenario(generators=2, lengths=ConstantLength(40), speeds=Speeds(token_s=1.0))
    befall = [(0.3, "crash", 0), (2.0, "restart", 0), (20.0, "crash", 1)]
    assert evaluate_while(tmp_path, two, befall).keys() == calm.keys()


def test_a_long_queue_is_no_sign_of_a_generator_that_hangs(tmp_path):
    """Eight completions one after the other, each far from the limit."""
    slow = Scenario(lengths=ConstantLength(20), speeds=Speeds(token_s=0.5))
    assert evaluate_while(tmp_path, slow, [], max_concurrent=1, request_timeout_s=30.0)


@pytest.mark.parametrize(("generation", "in_flight"), [("batch", "none"), ("streaming", "keep")])
def test_generators_may_all_be_lost_during_a_rollout_of_any_length(tmp_path, generation, in_flight):
    """One that is back waits for weights as long as the learner takes."""
    config = make_config(
        {"generation": generation, "in_flight_updates": in_flight, "steps": 4, "prompts_per_step": 4},
        generator={"max_new_tokens": 64, "start_timeout_s": 100.0},
    )
    scenario = Scenario(
        lengths=ConstantLength(40),
        speeds=Speeds(train_s=400.0, token_s=0.5),
        faults=[Fault(generator=0, at=30.0, back_s=20.0)],
    )

    async def whole() -> int:
        simulation = Simulation(config, scenario, tmp_path)
        await simulation.run()
        simulation.outcome()
        return len(simulation.generators[0].engines)

    assert run_in_virtual_time(whole(), patience_s=1e5) == 2


@pytest.mark.parametrize("interrupted_at", [0.5, 5.0, 11.0, 12.0, 14.5])
def test_an_evaluation_is_given_up_even_while_its_generator_gets_weights_again(tmp_path, interrupted_at):
    """Nothing is left that a run, which is to end at once, would wait for."""
    config = make_config(
        {"steps": 2, "prompts_per_step": 4, "eval_every": 1},
        generator={"max_new_tokens": 64, "eval_temperature": 0.5},
        data={"eval_prompts": 8},
    )

    async def whole() -> None:
        simulation = Simulation(config, Scenario(lengths=ConstantLength(40), speeds=Speeds(push_s=2.0)), tmp_path)
        asyncio.get_running_loop().call_later(0.3, simulation.generators[0].crash)
        asyncio.get_running_loop().call_later(10.3, simulation.generators[0].restart)
        evaluation = asyncio.create_task(simulation.controller.evaluate("before"))
        await asyncio.sleep(interrupted_at)
        evaluation.cancel()
        await simulation.controller.stop()
        await asyncio.wait([evaluation])
        async with asyncio.timeout(1.0):
            await simulation.controller.run()

    run_in_virtual_time(whole(), patience_s=1e5)


@pytest.mark.parametrize("generation", ["batch", "streaming"])
def test_a_run_that_is_stopped_does_not_wait_for_an_evaluation(tmp_path, generation):
    config = make_config(
        {"generation": generation, "max_staleness": 0, "steps": 40, "prompts_per_step": 4, "eval_every": 1},
        generator={"max_new_tokens": 64, "max_concurrent": 4, "request_timeout_s": 3000.0},
        data={"eval_prompts": 100},
    )
    scenario = Scenario(lengths=ConstantLength(60), speeds=Speeds(token_s=0.1))

    async def whole() -> float:
        simulation = Simulation(config, scenario, tmp_path)
        running = asyncio.create_task(simulation.run())
        await asyncio.sleep(40.0)
        await simulation.controller.stop()
        await running
        return asyncio.get_running_loop().time() - 40.0

    assert run_in_virtual_time(whole(), patience_s=1e5) < 10.0


def test_held_out_completions_that_die_with_a_generator_are_no_samples_of_the_run(tmp_path):
    config = make_config(
        {"mode": "sync", "generation": "streaming", "steps": 3, "prompts_per_step": 4, "eval_every": 1},
        generator={"max_new_tokens": 64},
        data={"eval_prompts": 100},
    )
    scenario = Scenario(
        generators=2,
        lengths=ConstantLength(60),
        speeds=Speeds(token_s=0.1),
        faults=[Fault(generator=1, at=20.0, back_s=500.0)],
    )

    async def whole():
        simulation = Simulation(config, scenario, tmp_path)
        await simulation.run()
        return simulation.recorder.totals

    totals = run_in_virtual_time(whole(), patience_s=1e5)
    assert totals.samples_generated == 24 + totals.samples_cancelled
    assert totals.samples_cancelled <= 8  # of the rollout under way
