"""Tokens per second of a generator while weights are pushed to it, for every way to treat completions under way.

    .venv/bin/python tools/bench_in_flight.py --rounds 5

A real learner pushes to one real vLLM server each time so many completions have ended. The server always has the same
number of requests; their lengths have a long tail (log-normal). All ways do the same requests with the same seeds, turn
by turn; medians over the rounds, and the ratio to `wait`, which lets everything end before each push.

    wait       the engine drains before the push
    keep       completions freeze, and continue with the old cache
    recompute  completions freeze, and continue with a new cache
    resubmit   completions are cut off, and are asked for again with what they had
"""

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

from msgspec.structs import replace

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/e2e"))

from push_rig import PushRig, Receiver, push_rig

from megatron_async_rlhf.generator.protocol import SamplingRequest
from megatron_async_rlhf.generator.vllm.client import VLLMGenerator
from megatron_async_rlhf.types import Completion

WAYS = {"wait": ("wait", True), "keep": ("keep", False), "recompute": ("keep", True), "resubmit": ("abort", True)}


def requests_of(options: argparse.Namespace, rig: PushRig) -> list[SamplingRequest]:
    rng = random.Random(0)
    prompts = rig.run_inputs.train
    return [
        SamplingRequest(
            prompt=prompts[i % len(prompts)],
            samples=1,
            seed=i,
            temperature=1.0,
            max_new_tokens=min(options.longest, max(4, round(rng.lognormvariate(options.mu, options.sigma)))),
        )
        for i in range(options.requests)
    ]


async def complete(generator: VLLMGenerator, request: SamplingRequest) -> Completion:
    """Asks again for what was cut off, until it is whole."""
    while (completion := (await generator.sample(request))[0]).interrupted:
        request = replace(request, begun=completion)
    return completion


async def measure(options: argparse.Namespace, rig: PushRig, way: str, requests: list[SamplingRequest]) -> list[float]:
    """One round: all requests, `concurrent` at a time. Returns tokens per second, and seconds of a push."""
    generator = rig.generators[0]
    receivers = [Receiver(generator, *WAYS[way])]
    waiting, due = iter(requests), asyncio.Semaphore(0)
    ended: list[Completion] = []
    pushes: list[float] = []

    async def ask() -> None:
        for request in waiting:
            ended.append(await complete(generator, request))
            if len(ended) % options.push_every == 0:
                due.release()

    async def push() -> None:
        for _ in range((len(requests) - 1) // options.push_every):
            await due.acquire()
            began = time.monotonic()
            await rig.weights.push(rig.version, receivers)
            await generator.resume()
            pushes.append(time.monotonic() - began)

    await generator.resume()
    began = time.monotonic()
    pushing = asyncio.create_task(push())
    await asyncio.gather(*(ask() for _ in range(options.concurrent)))
    seconds = time.monotonic() - began
    await pushing
    return [sum(len(completion.token_ids) for completion in ended) / seconds, statistics.mean(pushes)]


async def run(options: argparse.Namespace) -> None:
    settings = [
        *(f"model.{key}={value}" for key, value in (("layers", 4), ("hidden_size", 128), ("ffn_size", 384))),
        *("model.heads=4", "model.kv_heads=2", "model.init_std=0.02", f"model.context_length={options.longest + 64}"),
        *(f"learner.micro_batch_tokens={2 * options.longest + 128}", f"generator.max_concurrent={options.concurrent}"),
        *("schedule.generation=streaming", "schedule.in_flight_updates=keep"),
    ]
    with tempfile.TemporaryDirectory() as directory:
        async with push_rig(Path(directory), *settings) as rig:
            requests = requests_of(options, rig)
            rounds: dict[str, list[list[float]]] = {way: [] for way in WAYS}
            await rig.push(rig.version)
            await measure(options, rig, "keep", requests[: options.concurrent * 2])  # warm
            for _ in range(options.rounds):
                for way in WAYS:
                    rounds[way].append(await measure(options, rig, way, requests))
    report(options, requests, rounds)


def report(options: argparse.Namespace, requests: list[SamplingRequest], rounds: dict[str, list[list[float]]]) -> None:
    lengths = sorted(request.max_new_tokens for request in requests)
    print(
        f"{len(requests)} requests, at most {lengths[len(lengths) // 2]} tokens in the median and {lengths[-1]} at most; "
        f"{options.concurrent} at a time, a push every {options.push_every}; median of {options.rounds} rounds"
    )
    print(f"{'':10} tokens/s  / wait  seconds of a push, with its pause")
    for way, results in rounds.items():
        ratio = statistics.median(mine[0] / base[0] for mine, base in zip(results, rounds["wait"], strict=True))
        speed, push = (statistics.median(column) for column in zip(*results, strict=True))
        print(f"{way:10} {speed:8.0f} {ratio:7.2f}  {push:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--concurrent", type=int, default=16, help="requests that the server has at any time")
    parser.add_argument("--push-every", type=int, default=16, help="completions from one push to the next")
    parser.add_argument("--mu", type=float, default=4.0, help="mean of the logarithm of a length")
    parser.add_argument("--sigma", type=float, default=1.0, help="its standard deviation")
    parser.add_argument("--longest", type=int, default=600, help="tokens of the longest completion")
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
