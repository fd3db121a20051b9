"""The controller's view of a generator: tokens in, tokens out, and weights received. No torch."""

from typing import Protocol

from msgspec import Struct

from megatron_async_rlhf.types import Completion, Prompt


class SamplingRequest(Struct, frozen=True, kw_only=True):
    """One prompt to sample `samples` completions for.

    Attributes:
        seed: of the sampler; with it a request's noise does not depend on what else is running.
        temperature: 0 is greedy.
        order: position among the requests submitted together; the engine schedules lower first.
    """

    prompt: Prompt
    samples: int
    seed: int
    temperature: float
    max_new_tokens: int
    order: int = 0


class Generator(Protocol):
    """One vLLM server, or anything that behaves like one.

    Raises (all methods):
        GeneratorError: naming the generator and what was asked of it.
    """

    name: str
    version: int

    async def sample(self, request: SamplingRequest) -> list[Completion]: ...

    async def pause(self) -> None: ...

    async def resume(self) -> None: ...

    async def wait_queued(self, count: int) -> None:
        """While paused: return once `count` requests are with the engine."""
        ...
