"""Decoding in virtual time, against times derived by hand."""

import asyncio

import pytest

from megatron_async_rlhf.simulate.engine import Engine, EngineSequence
from megatron_async_rlhf.simulate.scenario import Speeds
from megatron_async_rlhf.simulate.virtual_time import run_in_virtual_time

SPEEDS = Speeds(token_s=1.0, sequence_s=0.5, prompt_token_s=0.1)


def seconds_until_all_end(running: int, *, prompt: int, remade: int = 0, slowness: float = 1.0) -> float:
    """Of so many sequences of 10 tokens; after two seconds the engine makes `remade` tokens of cache again."""

    async def whole() -> float:
        loop, left, done = asyncio.get_running_loop(), running, asyncio.Event()
        begun = loop.time()
        engine = Engine(SPEEDS, places=running, slowness=slowness)
        engine.set_weights(0)

        def ended(_: EngineSequence) -> None:
            nonlocal left
            left -= 1
            if not left:
                done.set()

        for _ in range(running):
            engine.add(EngineSequence(10, prompt, ended), 0)
        await asyncio.sleep(2.0)
        engine.pause()
        engine.recompute(remade)
        engine.resume()
        await done.wait()
        return loop.time() - begun

    return run_in_virtual_time(whole(), patience_s=1e6)


@pytest.mark.parametrize("running", [1, 8, 100])
def test_a_cache_made_again_takes_as_long_whatever_runs_beside_it(running):
    assert seconds_until_all_end(running, prompt=1) == pytest.approx(11 * (1 + 0.5 * running))
    assert seconds_until_all_end(running, prompt=1, remade=400) == pytest.approx(11 * (1 + 0.5 * running) + 40)


def test_a_long_prompt_takes_the_steps_that_pass_meanwhile():
    assert seconds_until_all_end(1, prompt=10) == pytest.approx(11 * 1.5)  # in one step, as any
    # 10 s are seven steps.
    assert seconds_until_all_end(1, prompt=100) == pytest.approx((7 + 10) * 1.5)


def test_a_slow_generator_takes_longer_for_its_cache_too():
    assert seconds_until_all_end(2, prompt=1, remade=400, slowness=3.0) == pytest.approx(3 * (11 * 2 + 40))
