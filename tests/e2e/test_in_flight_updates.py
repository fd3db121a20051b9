"""Weights that change while real vLLM servers sample: every token against Transformers under the weights it was sampled with.

One rig for all: generator.0 runs as for `schedule.in_flight_updates: keep`, without a prefix cache; generator.1 as for
the other modes.
"""

import asyncio
import os
import signal
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from push_rig import START_S, PushRig, Receiver, logprobs_of, push_rig
from transformers import AutoModelForCausalLM

from megatron_async_rlhf.errors import GeneratorError, GeneratorGoneError
from megatron_async_rlhf.generator.protocol import Pause, SamplingRequest
from megatron_async_rlhf.generator.vllm.client import VLLMGenerator, continued_seed
from megatron_async_rlhf.launch.process import LocalProcess
from megatron_async_rlhf.types import Completion, Prompt

CONTEXT = 1024
LONGEST = 500
SAMPLES = 16
SPANNING = 4  # completions that an update must meet, at least
LIMIT_S = 200
BLOCK = 128  # tokens of a block of the CPU's cache; only whole ones are shared

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class InFlightRig:
    """The rig, an event loop that outlives a test, and the weights of every version so far."""

    def __init__(self, runner: asyncio.Runner, rig: PushRig) -> None:
        self.run = runner.run
        self.rig = rig
        self.keeping, self.other = rig.generators[0], rig.generators[-1]
        self.models: dict[int, torch.nn.Module] = {}
        # Longer than a block of the cache, so that it could be shared.
        token_ids = [token for prompt in rig.run_inputs.train for token in prompt.token_ids][: BLOCK + 30]
        self.prompt = Prompt(index=0, text="", token_ids=token_ids, reference={})

    async def push(self, *receivers: Receiver) -> None:
        """The learner's weights as they are to both, which stay paused."""
        rig, version = self.rig, self.rig.version
        await rig.weights.push(version, receivers)
        if version not in self.models:
            self.models[version] = AutoModelForCausalLM.from_pretrained(await rig.export())

    async def push_to_both(self, how: Pause = "keep", *, recompute: bool = True) -> None:
        """`other` receives as asked, `keeping` always keeps."""
        await self.push(Receiver(self.keeping, "keep", False), Receiver(self.other, how, recompute))

    def request(self, seed: int, *, samples: int = SAMPLES, longest: int = LONGEST, **more) -> SamplingRequest:
        return SamplingRequest(
            prompt=self.prompt, samples=samples, seed=seed, temperature=1.0, max_new_tokens=longest, **more
        )

    def begin(self, generator: VLLMGenerator, seed: int, **more) -> asyncio.Task:
        return asyncio.create_task(generator.sample(self.request(seed, **more)))

    async def begin_and_freeze(self, generator: VLLMGenerator, seed: int) -> asyncio.Task:
        """Some requests, frozen after some tokens. Who was too slow to freeze them in time tries again."""
        async with asyncio.timeout(LIMIT_S):
            while True:
                await generator.resume()
                before = self.metric(generator, "generation_tokens_total")
                task = self.begin(generator, seed)
                await self.until(lambda: self.metric(generator, "generation_tokens_total") >= before + 8 * SAMPLES)
                await generator.pause("keep")
                if self.metric(generator, "num_requests_running") >= SPANNING:
                    return task
                await generator.resume()
                await task

    async def until(self, condition) -> None:
        async with asyncio.timeout(LIMIT_S):
            while not condition():
                await asyncio.sleep(0.01)

    def metric(self, generator: VLLMGenerator, name: str) -> float:
        url = self.rig.urls[int(generator.name.split(".")[1])]
        with urllib.request.urlopen(f"{url}/metrics", timeout=10) as response:
            lines = response.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"vllm:{name}{{"))

    def gaps(self, completion: Completion) -> dict[int, float]:
        """Largest difference from Transformers over the tokens of each version, given all tokens before."""
        return {
            version: max(
                abs(exact - sampled)
                for exact, sampled, v in zip(
                    self.exact(completion, version), completion.logprobs, completion.versions, strict=True
                )
                if v == version
            )
            for version in set(completion.versions)
        }

    def drift(self, completion: Completion) -> float:
        """How far its first and its last version are apart, over all of its tokens."""
        one, other = (
            self.exact(completion, version) for version in completion.versions[:: len(completion.versions) - 1]
        )
        return max(abs(a - b) for a, b in zip(one, other, strict=True))

    def exact(self, completion: Completion, version: int) -> list[float]:
        return logprobs_of(self.models[version], self.prompt.token_ids, completion.token_ids)


# The first steps change the weights much, the later ones as little as RL of a large model does.
RATES = ["learner.learning_rate=0.003", "learner.min_learning_rate=3e-6", "schedule.steps=3"]
SIZES = [f"model.context_length={CONTEXT}", f"learner.micro_batch_tokens={2 * CONTEXT}"]
KEEPING = ["schedule.generation=streaming", "schedule.in_flight_updates=keep"]


@contextmanager
def in_flight_rig(directory: Path, *overrides: str, **options):
    with asyncio.Runner() as runner:
        starting = push_rig(directory, *RATES, *SIZES, *KEEPING, *overrides, **options)
        rig = InFlightRig(runner, runner.run(starting.__aenter__()))
        try:
            yield rig
        finally:
            runner.run(starting.__aexit__(None, None, None))


@pytest.fixture(scope="module")
def rig(tmp_path_factory):
    directory, without = tmp_path_factory.mktemp("in_flight"), {"generator.1": "--no-enable-prefix-caching"}
    with in_flight_rig(directory, "generator.replicas=2", without=without) as rig:
        rig.run(rig.push_to_both())
        yield rig


def test_frozen_completions_go_on_with_new_weights(rig: InFlightRig):
    """Recomputed, every token is what Transformers says; with the old cache, those before the update are."""
    old, new = rig.rig.version, rig.rig.version + 1

    async def sample():
        await rig.rig.change_weights()
        tasks = [await rig.begin_and_freeze(generator, seed=1) for generator in (rig.keeping, rig.other)]
        await rig.push_to_both("keep", recompute=True)
        # Asked while all the others hold blocks of the old weights under the very same prompt.
        later = [rig.begin(generator, seed=2, samples=2, longest=20) for generator in (rig.keeping, rig.other)]
        for generator in (rig.keeping, rig.other):
            await generator.wait_queued(2)
            await generator.resume()
        return await asyncio.gather(*tasks), await asyncio.gather(*later)

    (kept, recomputed), later = rig.run(sample())
    for completions in (kept, recomputed):
        assert all(c.versions == sorted(c.versions) and not c.interrupted for c in completions)
    spanning = [[c for c in completions if set(c.versions) == {old, new}] for completions in (kept, recomputed)]
    assert min(map(len, spanning)) >= SPANNING
    assert max(gap for c in recomputed for gap in rig.gaps(c).values()) <= 1e-4
    assert max(rig.gaps(c)[old] for c in kept if old in c.versions) <= 1e-4
    # The old cache shows, so the comparison can tell; but less than the old weights would.
    assert all(1e-3 < rig.gaps(c)[new] < rig.drift(c) for c in spanning[0])
    assert all({new} == set(c.versions) and rig.gaps(c)[new] <= 1e-4 for two in later for c in two)


def test_cut_off_completions_go_on_elsewhere(rig: InFlightRig):
    old, new = rig.rig.version, rig.rig.version + 1

    async def sample():
        await rig.rig.change_weights()
        task = await rig.begin_and_freeze(rig.other, seed=3)
        await rig.push_to_both("abort")
        begun = await asyncio.wait_for(task, LIMIT_S)  # they come back while the engine is paused
        await asyncio.gather(rig.other.resume(), rig.keeping.resume())
        # Both servers have the new weights: it does not matter which one continues.
        tasks = [
            rig.begin((rig.keeping, rig.other)[i % 2], seed=3 + i, samples=1, begun=c) for i, c in enumerate(begun)
        ]
        return begun, [c for one in await asyncio.gather(*tasks) for c in one]

    begun, ended = rig.run(sample())
    cut = [(b, e) for b, e in zip(begun, ended, strict=True) if b.interrupted]
    assert len(cut) >= SPANNING
    for before, whole in zip(begun, ended, strict=True):
        assert set(before.versions) == {old} and not whole.interrupted
        length = len(before.token_ids)
        assert len(whole.token_ids) == len(whole.logprobs) == len(whole.versions) <= LONGEST
        assert (whole.token_ids[:length], whole.logprobs[:length]) == (before.token_ids, before.logprobs)
        assert whole.versions == [old] * length + [new] * (len(whole.token_ids) - length)
        assert whole.finished or len(whole.token_ids) == LONGEST
        assert max(rig.gaps(whole).values()) <= 1e-4
        if not before.interrupted:
            assert whole == before


def test_a_small_change_shows_little_through_the_old_cache(rig: InFlightRig):
    """At the learning rate of large models, 3e-6."""

    async def sample():
        await rig.rig.change_weights()  # the last of the large steps
        await rig.push_to_both()
        await rig.rig.change_weights()
        task = await rig.begin_and_freeze(rig.keeping, seed=5)
        await rig.push_to_both()
        await asyncio.gather(rig.other.resume(), rig.keeping.resume())
        return await task

    old = rig.rig.version + 1
    spanning = [c for c in rig.run(sample()) if set(c.versions) == {old, old + 1}]
    assert len(spanning) >= SPANNING
    for completion in spanning:
        gaps = rig.gaps(completion)
        assert gaps[old] <= 1e-4
        assert gaps[old + 1] < rig.drift(completion) < 0.01


def test_what_is_begun_decides_what_is_left(rig: InFlightRig):
    async def sample():
        async def one(begun: Completion | None, longest: int = 12, seed: int = 7) -> Completion:
            return (await rig.other.sample(rig.request(seed, samples=1, longest=longest, begun=begun)))[0]

        nothing = Completion(token_ids=[], logprobs=[], versions=[], finished=False, text="", interrupted=True)
        whole = await one(None)
        assert await one(nothing) == whole  # cut off before its first token
        full = await one(Completion(**{f: getattr(whole, f) for f in whole.__struct_fields__} | {"interrupted": True}))
        assert full == whole  # there is no room for another token
        first = await one(None, longest=6)
        longer = await one(first, longest=12)
        assert longer.token_ids[:6] == first.token_ids and longer == await one(first, longest=12)
        # Not the noise of the first six tokens once more.
        again = await rig.other.sample(
            SamplingRequest(
                prompt=Prompt(index=0, text="", token_ids=rig.prompt.token_ids + first.token_ids, reference={}),
                samples=1, seed=continued_seed(7, 6), temperature=1.0, max_new_tokens=6,
            )
        )  # fmt: skip
        assert longer.token_ids[6:] == again[0].token_ids and continued_seed(7, 6) not in (7, continued_seed(7, 5))
        with pytest.raises(GeneratorError, match="only one sample"):
            await rig.other.sample(rig.request(1, samples=2, begun=first))

    rig.run(sample())


def test_an_abort_loses_nothing_and_a_cancelled_request_ends_at_the_server(rig: InFlightRig):
    async def sample():
        server = rig.other
        await server.pause("keep")
        queued = rig.begin(server, seed=9, samples=3)
        await server.wait_queued(1)
        await server.pause("abort")
        for completion in await asyncio.wait_for(queued, LIMIT_S):
            assert completion.interrupted and not completion.token_ids and not completion.versions
        asked_while_paused = rig.begin(server, seed=9, samples=1, longest=5)
        await server.wait_queued(1)
        await server.resume()
        assert not (await asked_while_paused)[0].interrupted

        cancelled = await rig.begin_and_freeze(server, seed=11)
        sampled = rig.metric(server, "generation_tokens_total")
        cancelled.cancel()
        async with asyncio.timeout(LIMIT_S):
            while (await server._server.get("/load"))["server_load"]:
                await asyncio.sleep(0.01)
        await server.resume()
        await server.sample(rig.request(12, samples=1, longest=2))  # makes a step, after which the metrics are new
        await rig.until(lambda: rig.metric(server, "num_requests_running") == 0)
        assert rig.metric(server, "generation_tokens_total") <= sampled + 2

    rig.run(sample())


def test_reconnecting_leaks_nothing(rig: InFlightRig):
    """Sockets, threads and other descriptors of learner and workers after many sessions."""

    def held() -> dict[str, tuple[int, int]]:
        counted = {}
        for who, pid in rig.rig._pids().items():
            counted[who] = (len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task")))
        return counted

    async def reconnect(times: int):
        for _ in range(times):
            rig.rig.weights.disconnect()
            await rig.rig.push(rig.rig.version)

    rig.run(reconnect(2))
    before = held()
    rig.run(reconnect(20))
    grown = {who: (before[who], now) for who, now in held().items() if now > before[who]}
    assert not grown
    for generator in rig.rig.generators:
        rig.run(generator.resume())


@pytest.mark.thorough
def test_a_generator_that_dies_is_noticed_at_once(rig: InFlightRig):
    """Its engine alone, then all of it; a server started in its place is not taken for it, until it has weights."""

    async def lose(generator: VLLMGenerator, kill) -> None:
        task = await rig.begin_and_freeze(generator, seed=13)
        began = time.monotonic()
        kill()
        with pytest.raises(GeneratorGoneError, match=generator.name):
            await asyncio.wait_for(task, LIMIT_S)
        assert time.monotonic() - began < LIMIT_S / 2  # far below generator.request_timeout_s
        assert generator.version == -1 and not await generator.is_ready()

    def kill_engine() -> None:
        for pid in rig.rig._pids().values():
            if Path(f"/proc/{pid}/comm").read_text().startswith("VLLM::EngineCor") and os.getsid(pid) == other.pid:
                os.kill(pid, signal.SIGKILL)

    async def start_again() -> None:
        processes, name = rig.rig.processes, rig.other.name
        other.kill_group(signal.SIGKILL)
        other.clean_up()
        processes[name] = LocalProcess(other.spec, other.log.parent)
        async with asyncio.timeout(START_S):
            while not await rig.other.is_ready():
                await asyncio.sleep(0.25)
        for ask in (rig.other.pause, lambda: rig.other.sample(rig.request(15, samples=2, longest=5))):
            await rig.other.resume()
            rig.other.version = rig.rig.version  # had nothing been asked of it while it was gone
            with pytest.raises(GeneratorGoneError, match="started again and has no weights"):
                await ask()
            assert rig.other.version == -1
        rig.rig.weights.disconnect()
        await rig.push(Receiver(rig.other, "keep", True))
        assert rig.other.version == rig.rig.version
        await rig.other.resume()
        for completion in await rig.other.sample(rig.request(15, samples=2, longest=5)):
            assert rig.gaps(completion)[rig.rig.version] <= 1e-4

    other = rig.rig.processes[rig.other.name]
    rig.run(lose(rig.other, kill_engine))
    rig.run(lose(rig.keeping, lambda: rig.rig.signal(rig.keeping.name, signal.SIGKILL)))
    rig.run(start_again())


@pytest.mark.thorough
@pytest.mark.parametrize("recompute", [False, True])
def test_tensor_parallel_workers_receive_while_requests_are_frozen(tmp_path, recompute):
    with in_flight_rig(tmp_path, "generator.tensor_parallel=2") as rig:

        async def sample():
            await rig.push(Receiver(rig.other, "keep", recompute))
            await rig.rig.change_weights()
            task = await rig.begin_and_freeze(rig.other, seed=1)
            await rig.push(Receiver(rig.other, "keep", recompute))
            await rig.other.resume()
            return await task

        spanning = [c for c in rig.run(sample()) if set(c.versions) == {0, 1}]
        assert len(spanning) >= SPANNING
        for completion in spanning:
            gaps = rig.gaps(completion)
            assert gaps[0] <= 1e-4
            assert gaps[1] <= 1e-4 if recompute else 1e-3 < gaps[1] < rig.drift(completion)
