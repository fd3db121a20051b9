"""All generators as one: batches dealt over replicas in a fixed order, weights received by all or none."""

import asyncio
import hashlib
from collections.abc import Sequence

from megatron_async_rlhf.generator.protocol import Generator, SamplingRequest
from megatron_async_rlhf.types import Completion


class GeneratorPool:
    """Replicas that hold the same policy version between pushes."""

    def __init__(self, generators: Sequence[Generator]) -> None:
        self.generators = list(generators)

    @property
    def version(self) -> int:
        """The version of the most outdated replica."""
        return min(generator.version for generator in self.generators)

    async def sample(self, requests: Sequence[SamplingRequest]) -> list[list[Completion]]:
        """Completions of every request, in order.

        Requests are queued while the engines are paused and run in their `order`, so that which sequences share a
        forward pass does not depend on the network.
        """
        await self.pause()
        shares = [requests[i :: len(self.generators)] for i in range(len(self.generators))]
        async with asyncio.TaskGroup() as tasks:
            pending = [
                [tasks.create_task(generator.sample(request)) for request in share]
                for generator, share in zip(self.generators, shares, strict=True)
            ]
            for generator, share in zip(self.generators, shares, strict=True):
                await generator.wait_queued(len(share))
            await asyncio.gather(*(generator.resume() for generator in self.generators))
        answers = [[task.result() for task in share] for share in pending]
        return [answers[i % len(answers)][i // len(answers)] for i in range(len(requests))]

    async def pause(self) -> None:
        await asyncio.gather(*(generator.pause() for generator in self.generators))


def request_seed(*identity: object) -> int:
    """A sampler seed that depends on nothing but what is being sampled: run seed, stage, step, position."""
    digest = hashlib.blake2b(repr(identity).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
