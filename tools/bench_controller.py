"""Completions per second that one core of the controller can take in: everything but the machines around it is real.

    .venv/bin/python tools/bench_controller.py

The controller process has the real scheduler, the real HTTP client of vLLM with its tokenizer, real rewards and
recorder, and a learner that only encodes the command and decodes an answer as big as a real one. A second process, on
another core, answers as the real server's route for samples does, at once and always the same: tokens, their
log-probabilities, and the version of the weights.

`--slow-ms` scores with a function in worker processes that sleeps that long for every completion, as a slow verifier would:
the samples per second that the workers could score are printed beside those that were, and the longest time that the event
loop did nothing else, which is measured by a task that wants to run every 5 milliseconds.

`samples/s of a core` divides by the controller's processor time, which other load on the machine disturbs less than the
wall clock. The controller is fast enough if a core of it takes in what all generators of a cluster make.
"""

import asyncio
import cProfile
import json
import multiprocessing
import os
import pstats
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from aiohttp import web
from msgspec import structs

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.data.builtin_task import make_examples
from megatron_async_rlhf.data.prompts import PromptOrder, build_prompts
from megatron_async_rlhf.data.tokenizer import Tokenizer, train_bpe_tokenizer
from megatron_async_rlhf.generator.vllm.client import VLLMGenerator
from megatron_async_rlhf.generator.vllm.packed import PackedAnswer, PackedCompletion, PackedRequest
from megatron_async_rlhf.interpreter import collect_rarely
from megatron_async_rlhf.launch.nodes import free_ports
from megatron_async_rlhf.learner.protocol import (
    Answer,
    Command,
    FinishPush,
    TrainRollout,
    decode_answer,
    encode_answer,
)
from megatron_async_rlhf.learner.rollout import messages
from megatron_async_rlhf.rewards.registry import make_reward
from megatron_async_rlhf.scheduler.controller import Controller
from megatron_async_rlhf.scheduler.pool import GeneratorPool
from megatron_async_rlhf.scheduler.weight_sync import WeightSync
from megatron_async_rlhf.serving.connection import SAMPLE
from megatron_async_rlhf.simulate.simulation import NoCheckpoints
from megatron_async_rlhf.telemetry.events import EventStream
from megatron_async_rlhf.telemetry.recorder import Recorder
from megatron_async_rlhf.types import PushReport, StepMetrics

SHAPE = {"layers": 2, "hidden_size": 64, "ffn_size": 96, "heads": 2, "context_length": 1024}
VOCAB = 2000
_WORKERS_START_S = 5.0
_BEAT_S = 0.005


def serve(port: int, length: int, core: int) -> None:
    """A server that has always finished already."""
    os.sched_setaffinity(0, {core})
    rng = random.Random(0)
    version = "0"

    def completion() -> PackedCompletion:
        tokens = [rng.randrange(300, VOCAB) for _ in range(length)]
        logprobs = [-rng.expovariate(1.0) for _ in range(length)]
        return PackedCompletion.of(tokens, logprobs, "length", None)

    completions = [completion() for _ in range(16)]

    async def sample(request: web.Request) -> web.Response:
        asked = msgspec.msgpack.decode(await request.read(), type=PackedRequest)
        wanted = [structs.replace(each, versions=[(version, 0, length)]) for each in completions[: asked.samples]]
        return web.Response(body=msgspec.msgpack.encode(PackedAnswer(wanted)))

    async def finish(request: web.Request) -> web.Response:
        nonlocal version
        version = json.loads(await request.read())["weight_version"]
        return web.json_response({})

    async def anything(request: web.Request) -> web.Response:
        return web.json_response({"server_load": 10**6, "success": True, "weight_version": version})

    server = web.Application()
    server.router.add_post(SAMPLE, sample)
    server.router.add_post("/finish_weight_update", finish)
    server.router.add_route("*", "/{any:.*}", anything)
    web.run_app(server, host="127.0.0.1", port=port, print=None)


@contextmanager
def served(length: int) -> Iterator[str]:
    """Such a server in a process of its own; its address."""
    (port,) = free_ports(1)
    process = multiprocessing.get_context("spawn").Process(
        target=serve, args=(port, length, 1 % os.cpu_count()), daemon=True
    )
    process.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.join()


class CodingLearner:
    """Takes no time but for the messages."""

    async def execute(self, command: Command) -> Answer:
        for _ in messages(command):
            await asyncio.sleep(0)  # the client sends each before it makes the next
        answer = Answer(id=0, push=PushReport(wire_bytes=0) if isinstance(command, FinishPush) else None)
        if isinstance(command, TrainRollout):
            rows = [s for group in command.mini_batches[0] for s in group.sequences]
            answer = Answer(
                id=0,
                steps=[StepMetrics(values={"loss": 1.0})],
                logprobs=[[-1.25] * (len(s.token_ids) - s.prompt_length) for s in rows],
            )
        encoded = await asyncio.to_thread(encode_answer, answer)  # another process's work
        return decode_answer(encoded)


class Heartbeat:
    """The longest that the event loop kept a task waiting, which wakes rarely enough to cost nothing."""

    def __init__(self) -> None:
        self.longest = 0.0

    async def beat(self) -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(_BEAT_S)
            self.longest = max(self.longest, time.perf_counter() - before - _BEAT_S)


async def run(config: RunConfig, directory: Path, url: str) -> tuple[float, float, float]:
    """Wall clock and processor time of the RL loop, and the longest that its event loop was held up."""
    examples = make_examples(0, 4096, "train")
    train_bpe_tokenizer(directory, [example.text for example in examples], VOCAB)
    tokenizer = Tokenizer.load(directory)
    generators = [
        VLLMGenerator(
            f"generator.{i}",
            url,
            tokenizer=tokenizer,
            tensor_parallel=1,
            request_timeout_s=300.0,
            probe_timeout_s=60.0,
        )
        for i in range(4)
    ]
    for generator in generators:
        generator.version = 0
    learner = CodingLearner()
    controller_prompts = PromptOrder(build_prompts(examples, tokenizer, 512), 0)
    recorder = Recorder(config, directory, EventStream(open(os.devnull, "w")))
    reward, heart = make_reward(config.rewards), Heartbeat()
    controller = Controller(
        config,
        learner=learner,
        pool=GeneratorPool(generators, max_concurrent=32, return_timeout_s=60.0, silence_limit_s=60.0),
        weight_sync=WeightSync(learner, config, ("127.0.0.1", 1)),
        reward=reward,
        prompts=controller_prompts,
        recorder=recorder,
        checkpoints=NoCheckpoints(),
    )
    while not await generators[0].is_ready():
        await asyncio.sleep(0.1)
    if config.rewards[0].type == "function":  # its processes start with the first prompt, and then use this core
        await reward.score(controller_prompts.at(0), [])
        await asyncio.sleep(_WORKERS_START_S)
    beating = asyncio.create_task(heart.beat())
    wall, processor = time.perf_counter(), time.process_time()
    await controller.run()
    spent = time.perf_counter() - wall, time.process_time() - processor, heart.longest
    beating.cancel()
    reward.close()
    recorder.close("completed", None)
    for generator in generators:
        await generator.close()
    return spent


SLOW = """
import time

def score(completions, slow_ms):
    time.sleep(slow_ms / 1000 * len(completions))
    return [len(text) % 7 for text in completions]
"""


def slow_reward(directory: Path, slow_ms: int, workers: int) -> dict:
    """A verifier that takes its time."""
    (directory / "slow.py").write_text(SLOW)
    kwargs = {"slow_ms": slow_ms}
    return {"type": "function", "function": f"{directory}/slow.py:score", "kwargs": kwargs, "workers": workers}


def main(
    samples: Annotated[int, typer.Option(help="Completions in all, for each K.")] = 16384,
    length: Annotated[int, typer.Option(help="Tokens of each.")] = 128,
    k: Annotated[list[int], typer.Option(help="Completions per prompt, as one request.")] = [2, 4],
    slow_ms: Annotated[int, typer.Option(help="Score with a function that sleeps so long for each completion.")] = 0,
    workers: Annotated[int, typer.Option(help="Processes that call it.")] = 8,
    profile: Annotated[bool, typer.Option(help="Say what the time goes into.")] = False,
) -> None:
    """Print completions per second, by the wall clock and of a whole core."""
    os.sched_setaffinity(0, {0})
    collect_rarely()  # as the controller process does
    head = f"{'K':>3}{'samples/s':>12}{'share of a core':>18}{'samples/s of a core':>22}{'event loop held up':>20}"
    print(head + (f"{'workers could':>15}" if slow_ms else ""))
    for number in k:
        with tempfile.TemporaryDirectory() as directory:
            reward = slow_reward(Path(directory), slow_ms, workers) if slow_ms else {}
            config = RunConfig.model_validate(
                {
                    "model": SHAPE,
                    "schedule": {
                        "steps": -(-samples // 512),
                        "prompts_per_step": 512 // number,
                        "generation": "streaming",
                        "in_flight_updates": "keep",
                        "max_staleness": 2,
                    },
                    "algorithm": {"samples_per_prompt": number},
                    "generator": {"max_new_tokens": length},
                    "reward": reward,
                }
            )
            profiler = cProfile.Profile()
            if profile:
                profiler.enable()
            with served(length) as url:
                wall, processor, held = asyncio.run(run(config, Path(directory), url))
            profiler.disable()
        done = config.schedule.steps * 512
        line = f"{number:>3}{done / wall:>12.0f}{processor / wall:>18.0%}{done / processor:>22.0f}"
        could = f"{workers * 1000 / slow_ms:>15.0f}" if slow_ms else ""
        print(f"{line}{held * 1000:>17.0f} ms{could}", flush=True)
        if profile:
            pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    typer.run(main)
