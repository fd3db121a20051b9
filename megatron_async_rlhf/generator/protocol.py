"""The controller's view of a generator: tokens in, tokens out, and weights received. No torch."""

from typing import Any, Literal, Protocol

from msgspec import Struct

from megatron_async_rlhf.types import Completion, Prompt


class SamplingRequest(Struct, frozen=True, kw_only=True):
    """One prompt to sample `samples` completions for.

    Attributes:
        seed: of the sampler; with it a request's noise does not depend on what else is running.
        temperature: 0 is greedy.
        order: position among the requests submitted together; the engine schedules lower first.
        begun: what an interrupted completion had so far, to continue from; `samples` is 1 then.
        held_out: for an evaluation; no sample of the run.
    """

    prompt: Prompt
    samples: int
    seed: int
    temperature: float
    max_new_tokens: int
    order: int = 0
    begun: Completion | None = None
    held_out: bool = False


# What becomes of requests under way: they freeze | run to their end first | end here, `interrupted`
Pause = Literal["keep", "wait", "abort"]


class Receiver(Protocol):
    """A generator as a receiver of weights.

    Raises (all methods):
        GeneratorError: naming the generator and what was asked of it.
    """

    name: str

    async def probe(self) -> None:
        """Return if it can work now, whether or not it has weights or is paused."""
        ...

    async def pause(self, how: Pause = "keep", *, clear_cache: bool = True) -> None:
        """From now on requests queue until it is told to continue.

        Args:
            clear_cache: empty the cache if no request is left to use it. `receive_weights` does so itself.
        """
        ...

    async def join_transfer(self, info: dict[str, Any], *, timeout_s: float) -> None: ...

    async def receive_weights(self, *, version: int, verify: bool, recompute: bool = True) -> None: ...


class Generator(Receiver, Protocol):
    """One vLLM server, or anything that behaves like one; its methods raise what a `Receiver`'s do."""

    version: int

    async def sample(self, request: SamplingRequest) -> list[Completion]:
        """All completions of a request; being cancelled cancels it at the engine too."""
        ...

    async def resume(self) -> None: ...

    async def wait_queued(self, count: int) -> None:
        """While paused: return once `count` requests are with the engine."""
        ...

    def give_up(self) -> None:
        """It is lost, whatever it still answers: all requests under way, and `wait_queued`, raise GeneratorGoneError."""
        ...
