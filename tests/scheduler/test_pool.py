"""Routing, loss and return of generators, on fakes whose requests end when the test says so."""

import asyncio

import pytest

from megatron_async_rlhf.errors import GeneratorError, GeneratorGoneError, GeneratorSilentError
from megatron_async_rlhf.generator.protocol import SamplingRequest
from megatron_async_rlhf.scheduler.pool import GeneratorPool
from megatron_async_rlhf.serving import returning
from megatron_async_rlhf.types import Completion, Prompt

PROMPT = Prompt(index=0, text="p", token_ids=[1, 2], reference={})


def completion(*token_ids, interrupted=False):
    return Completion(
        token_ids=list(token_ids),
        logprobs=[-1.0] * len(token_ids),
        versions=[0] * len(token_ids),
        finished=not interrupted,
        text="",
        interrupted=interrupted,
    )


class Engine:
    """Requests wait in `asked` for their answer; `alive` false: the process is gone; `hangs`: it does nothing."""

    version = 0

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive, self.hangs = True, False
        self.asked: list[tuple[SamplingRequest, asyncio.Future]] = []
        self.calls: list[str] = []

    async def sample(self, request: SamplingRequest) -> list[Completion]:
        if not self.alive:
            raise GeneratorGoneError(f"{self.name}: gone")
        answer = asyncio.get_running_loop().create_future()
        self.asked.append((request, answer))
        return await answer

    def die(self) -> None:
        self.alive = False
        for _, answer in self.asked:
            if not answer.done():
                answer.set_exception(GeneratorGoneError(f"{self.name}: gone"))

    async def pause(self, how: str = "keep", *, clear_cache: bool = True) -> None:
        self.calls.append(how)
        if not self.alive:
            raise GeneratorGoneError(f"{self.name}: gone")

    async def resume(self) -> None:
        self.calls.append("resume")

    async def wait_queued(self, count: int) -> None:
        while self.alive and len(self.asked) < count:
            await asyncio.sleep(0)

    def give_up(self) -> None:
        self.calls.append("give up")
        for _, answer in self.asked:
            if not answer.done():
                answer.set_exception(GeneratorGoneError(f"{self.name}: given up"))

    async def probe(self) -> None:
        if self.hangs:
            raise GeneratorSilentError(f"{self.name}: no answer to a probe", silent_s=0.0)
        if not self.alive:
            raise GeneratorGoneError(f"{self.name}: gone")


def request(samples=1, order=0, **fields):
    return SamplingRequest(
        prompt=PROMPT, samples=samples, seed=7, temperature=1.0, max_new_tokens=8, order=order, **fields
    )


def make(count=2, *, timeout=0.2, silence=60.0, **callbacks):
    engines = [Engine(f"generator.{i}") for i in range(count)]
    return engines, GeneratorPool(
        engines, max_concurrent=4, return_timeout_s=timeout, silence_limit_s=silence, **callbacks
    )


async def settle():
    for _ in range(20):
        await asyncio.sleep(0)


def run(test):
    async def bounded():
        async with asyncio.timeout(5):
            await test()

    asyncio.run(bounded())


def test_requests_go_to_whoever_has_the_least_to_do():
    async def test():
        engines, pool = make()
        tasks = [asyncio.create_task(pool.sample(request(samples))) for samples in (3, 1, 1, 1)]
        await settle()
        assert [[r.samples for r, _ in engine.asked] for engine in engines] == [[3], [1, 1, 1]]
        assert pool.room == 8 - 6
        engines[1].asked[0][1].set_result([completion(5)])
        assert await tasks[1] == [completion(5)]
        assert pool.room == 3

    run(test)


def test_requests_of_a_dead_generator_go_elsewhere_and_count_as_lost():
    async def test():
        lost = []
        engines, pool = make(on_lost=lambda generator, samples: lost.append((generator.name, samples)))
        tasks = [asyncio.create_task(pool.sample(request(2))) for _ in range(2)]
        await settle()
        engines[0].die()
        await settle()
        assert [len(engine.asked) for engine in engines] == [1, 2]
        for _, answer in engines[1].asked:
            answer.set_result([completion(4), completion(5)])
        assert await asyncio.gather(*tasks) == [[completion(4), completion(5)]] * 2
        assert lost == [("generator.0", 2)]
        assert pool.serving == [engines[1]]

    run(test)


def test_a_generator_that_is_back_serves_after_a_push_only(monkeypatch):
    monkeypatch.setattr(returning, "_WATCH_S", 0.001)

    async def test():
        engines, pool = make()
        back = []
        watch = asyncio.create_task(pool.watch(back.append))
        engines[0].die()
        await pool.mark_lost(engines[0], GeneratorGoneError("generator.0: gone"))
        assert pool.serving == [engines[1]] and pool.returned == []
        engines[0].alive = True
        while not back:
            await asyncio.sleep(0.001)
        assert pool.returned == [engines[0]] == back and pool.serving == [engines[1]]
        await pool.mark_updated(engines)
        assert pool.serving == engines
        watch.cancel()

    run(test)


def test_after_a_failed_push_nobody_holds_weights():
    async def test():
        engines, pool = make(3)
        await pool.mark_lost(engines[1], GeneratorGoneError("generator.1: gone"))
        assert not pool.without_weights
        await pool.mark_stale()
        assert (pool.serving, pool.returned, pool.room) == ([], [], 0)
        assert (pool.alive, pool.without_weights) == ([engines[0], engines[2]], True)
        await pool.mark_updated([engines[0]])  # the third did not take part
        assert (pool.serving, pool.without_weights) == ([engines[0]], True)

    run(test)


def test_when_all_are_gone_for_good_somebody_says_so(monkeypatch):
    monkeypatch.setattr(returning, "_WATCH_S", 0.001)

    async def test():
        engines, pool = make(timeout=0.05)
        for engine in engines:
            engine.die()
            await pool.mark_lost(engine, GeneratorGoneError(f"{engine.name}: no answer within 3 s"))
        says = r"no generator is left \(generator.0, generator.1\) .* 0.05 s.* The last one: generator.1: no answer within 3 s"
        with pytest.raises(GeneratorError, match=says):
            await pool.watch(lambda generator: None)

    run(test)


def test_whoever_is_back_is_waited_for_however_long_its_weights_take(monkeypatch):
    monkeypatch.setattr(returning, "_WATCH_S", 0.001)

    async def test():
        (engine,), pool = make(1, timeout=0.02)
        watching = asyncio.create_task(pool.watch(lambda generator: None))
        engine.die()
        await pool.mark_lost(engine, GeneratorGoneError("generator.0: gone"))
        task = asyncio.create_task(pool.sample(request()))
        engine.alive = True
        await asyncio.sleep(0.1)  # the learner is busy
        assert pool.returned == [engine] and not task.done() and not watching.done()
        await pool.mark_updated([engine])
        await settle()
        assert len(engine.asked) == 1
        for waiting in (task, watching):
            waiting.cancel()

    run(test)


def test_nothing_starts_while_weights_change():
    async def test():
        engines, pool = make(1)
        pool.hold()
        task = asyncio.create_task(pool.sample(request()))
        await settle()
        assert engines[0].asked == []
        await pool.resume()
        await settle()
        assert len(engines[0].asked) == 1
        task.cancel()

    run(test)


def test_what_was_cut_off_goes_on_where_there_is_room():
    async def test():
        engines, pool = make()
        task = asyncio.create_task(pool.sample(request(2)))
        await settle()
        pool.hold()
        engines[0].asked[0][1].set_result([completion(5, 6, interrupted=True), completion(7)])
        await settle()
        assert engines[1].asked == []  # not before the weights are there
        await pool.resume()
        await settle()
        ((rest, answer),) = [*engines[0].asked[1:], *engines[1].asked]
        assert (rest.samples, rest.begun.token_ids, rest.max_new_tokens) == (1, [5, 6], 8)
        assert rest.seed != 7  # the two samples of a request must not get the same noise
        answer.set_result([completion(5, 6, 9)])
        assert await task == [completion(5, 6, 9), completion(7)]

    run(test)


def test_a_wave_survives_the_death_of_a_generator():
    async def test():
        engines, pool = make()
        task = asyncio.create_task(pool.sample_together([request(order=i) for i in range(4)]))
        await settle()
        assert [[r.order for r, _ in engine.asked] for engine in engines] == [[0, 2], [1, 3]]
        engines[0].die()
        await settle()
        assert [r.order for r, _ in engines[1].asked] == [1, 3, 0, 2]
        for asked, answer in engines[1].asked:
            answer.set_result([completion(asked.order)])
        assert [group[0].token_ids for group in await task] == [[0], [1], [2], [3]]

    run(test)


def test_a_generator_that_answers_nothing_is_reported_once_with_all_its_requests(monkeypatch):
    async def test():
        silent = []
        engines, pool = make(on_silent=lambda generator, error: silent.append((generator.name, error.silent_s)))
        tasks = [asyncio.create_task(pool.sample(request())) for _ in range(4)]
        await settle()
        engines[0].asked[0][1].set_exception(GeneratorSilentError("generator.0: has answered nothing", silent_s=9.0))
        await settle()
        assert silent == [("generator.0", 9.0)]
        engines[1].die()  # whose process has ended: there is nothing to kill
        await settle()
        assert silent == [("generator.0", 9.0)]
        for task in tasks:
            task.cancel()

    run(test)


def test_a_lost_generator_whose_engine_leaves_probes_unanswered_is_reported_again(monkeypatch):
    monkeypatch.setattr(returning, "_WATCH_S", 0.001)

    async def test():
        silent = []
        engines, pool = make(
            timeout=60.0,
            silence=0.05,
            on_silent=lambda generator, error: silent.append((generator.name, error.silent_s)),
        )
        watching = asyncio.create_task(pool.watch(lambda generator: None))
        engines[0].hangs = True
        await pool.mark_lost(engines[0], GeneratorGoneError("generator.0: gone"))
        while not silent:
            await asyncio.sleep(0.001)
        assert silent[0][0] == "generator.0" and silent[0][1] >= 0.05
        assert pool.serving == [engines[1]]
        engines[0].hangs = False
        await asyncio.sleep(0.02)
        assert pool.returned == [engines[0]]
        watching.cancel()

    run(test)


def test_a_controller_that_is_started_anew_goes_on_with_the_generators_that_answer(monkeypatch):
    monkeypatch.setattr(returning, "_WATCH_S", 0.001)

    async def test():
        silent, back = [], []
        engines, pool = make(3, timeout=60.0, silence=0.05, on_silent=lambda generator, error: silent.append(generator))
        engines[1].hangs, engines[2].alive = True, False
        await pool.rejoin(back.append)
        assert pool.alive == pool.returned == back == [engines[0]]
        assert pool.without_weights and not pool.serving and not silent
        watching = asyncio.create_task(pool.watch(back.append))
        await pool.mark_updated([engines[0]])
        while not silent:
            await asyncio.sleep(0.001)
        assert set(silent) == {engines[1]} and pool.serving == [engines[0]]
        engines[2].alive = True
        while engines[2] not in back:
            await asyncio.sleep(0.001)
        assert pool.returned == [engines[2]]
        watching.cancel()

    run(test)


def test_a_generator_that_never_gets_ready_again_is_reported_although_others_serve(monkeypatch):
    monkeypatch.setattr(returning, "_WATCH_S", 0.001)
    monkeypatch.setattr(returning, "_RESTART_S", 0.01)

    async def test():
        silent = []
        engines, pool = make(timeout=0.05, on_silent=lambda generator, error: silent.append(str(error)))
        watching = asyncio.create_task(pool.watch(lambda generator: None))
        engines[0].die()
        await pool.mark_lost(engines[0], GeneratorGoneError("generator.0: gone"))
        while not silent:
            await asyncio.sleep(0.001)
        assert silent == ["generator.0: not ready within generator.start_timeout_s = 0.05"]
        assert not watching.done()
        watching.cancel()

    run(test)


def test_a_push_keeps_a_batch_from_its_engines(monkeypatch):
    """All die while a batch is being queued; the one that comes back is paused again once the push has let it continue."""

    async def test():
        (engine,), pool = make(1)
        engine.die()
        task = asyncio.create_task(pool.sample_together([request(order=i) for i in range(2)]))
        await settle()
        assert pool.serving == [] and engine.asked == []
        pool.hold()
        engine.alive = True
        await pool.mark_updated([engine])  # a push that it was lost in
        assert pool.serving == []
        await pool.rejoin(lambda generator: None)
        await pool.mark_updated([engine])
        await settle()
        assert engine.asked == [] and engine.calls[-1] == "give up"
        await pool.resume()
        await settle()
        assert engine.calls[-3:] == ["resume", "keep", "resume"] and len(engine.asked) == 2
        for asked, answer in engine.asked:
            answer.set_result([completion(asked.order)])
        assert len(await task) == 2

    run(test)


def test_nobody_waits_for_requests_at_a_generator_that_was_given_up():
    """It has died, and the server in its place will never have them; the others stay paused for as long."""

    async def test():
        engines, pool = make()

        async def never(count: int) -> None:
            gone = asyncio.get_running_loop().create_future()
            engines[0].asked.append((request(), gone))
            await gone

        engines[0].wait_queued = never
        task = asyncio.create_task(pool.sample_together([request(order=i) for i in range(4)]))
        await settle()
        assert "resume" not in engines[1].calls
        await pool.mark_lost(engines[0], GeneratorGoneError("generator.0: gone"))
        await settle()
        assert engines[1].calls[-1] == "resume"
        task.cancel()

    run(test)
