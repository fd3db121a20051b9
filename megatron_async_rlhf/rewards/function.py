"""A user's own function as a reward: called in worker processes, each call with a time limit.

    score ──> a free worker calls the function ──> scores, or one line on what is wrong with them
                     │
                     └── it takes too long, or the worker dies: the worker is replaced

The event loop only waits. A function that fails ends the run, or earns its completions 0 (`reward.on_error`).
"""

import asyncio
import logging
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

from pebble import ProcessExpired, ProcessPool

from megatron_async_rlhf.config.rewards import FunctionRewardSection
from megatron_async_rlhf.errors import ConfigError, RewardError
from megatron_async_rlhf.rewards.base import Score
from megatron_async_rlhf.rewards.function_worker import begin, call, describe
from megatron_async_rlhf.types import Completion, Prompt
from megatron_async_rlhf.user_functions import Parameters, file_of

_log = logging.getLogger(__name__)

# A worker may be ended by whoever ends a whole job, which tells every process of it.
_ATTEMPTS = 2


class TimeLimit(NamedTuple):
    """Of one call, and the key of the configuration that says so."""

    key: str
    seconds: float


class FunctionReward:
    """Scores that a function gives to all completions of a prompt at once.

    It gets `prompt` (the text without template), `completions` (their texts), the columns of the prompt's record by
    their names, and `reward.kwargs`, each only if it has a parameter for it. The workers start with the first prompt.
    """

    def __init__(self, section: FunctionRewardSection) -> None:
        self._section = section
        self._name = f"reward function {section.function}"
        self._pool: ProcessPool | None = None
        self._starting = asyncio.Lock()

    def check(self, prompt: Prompt) -> None:
        """Every prompt will do: only the function knows what it needs."""

    async def score(self, prompt: Prompt, completions: Sequence[Completion]) -> list[Score]:
        """Metrics: with `reward.on_error = zero` `reward_failed`, 1 if the function failed."""
        given = {
            **prompt.reference,
            **self._section.kwargs,
            "prompt": prompt.text,
            "completions": [completion.text for completion in completions],
        }
        may_fail = self._section.on_error == "zero"
        try:
            scores = await self._call(given)
        except RewardError as error:
            failure = f"{self._name} {error}; the prompt is {prompt.name}"
            if not may_fail:
                raise RewardError(f"{failure}. Correct the function, or set reward.on_error = zero") from None
            _log.error("%s", failure)
            return [Score(reward=0.0, metrics={"reward_failed": 1.0}, failure=failure) for _ in completions]
        return [Score(reward=score, metrics={"reward_failed": 0.0} if may_fail else {}) for score in scores]

    def sources(self) -> list[Path]:
        path = file_of(self._section.function)
        return [] if path is None else [path]

    def close(self) -> None:
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
            self._pool = None

    async def _call(self, given: Mapping[str, Any]) -> list[float]:
        """Raises RewardError: what went wrong, to follow the function's name."""
        async with self._starting:  # many prompts may be the first
            if self._pool is None:
                self._pool = await asyncio.to_thread(_started_pool, self._section.workers)
        pool = self._pool
        limit = TimeLimit("reward.timeout_s", self._section.timeout_s)
        answer = await _outcome(pool, limit, call, self._section.function, given)
        if isinstance(answer, str):
            raise RewardError(answer)
        return answer


def check_function(key: str, section: FunctionRewardSection, references: Sequence[Mapping[str, Any]]) -> None:
    """Import a reward function, in a process of its own, and see whether it can be called.

    Args:
        key: of `section` in the configuration.
        references: of the prompts it is to score.

    Raises:
        ConfigError: one line.
    """
    columns = set.intersection(*map(set, references))
    name, given = f"{key}.function = {section.function}", sorted({"prompt", "completions", *columns})
    parameters = inspect_function(name, section.function, TimeLimit(f"{key}.timeout_s", section.timeout_s))
    check_parameters(name, parameters, given, section.kwargs, f"{key}.kwargs")
    if not parameters.takes("completions"):
        names = ", ".join(parameters.names)
        raise ConfigError(f"{name} has no parameter `completions`, the texts to score, only {names}")


def inspect_function(name: str, function: str, limit: TimeLimit) -> Parameters:
    """A user's function's parameters, found out in a process of its own.

    Args:
        name: for messages.

    Raises:
        ConfigError: it cannot be imported in time.
    """
    pool = _started_pool(1)
    try:
        answer = asyncio.run(_outcome(pool, limit, describe, function))
    except RewardError as error:
        answer = str(error)
    finally:
        pool.stop()
        pool.join()
    if isinstance(answer, str):
        raise ConfigError(f"{name} {answer}")
    return answer


def check_parameters(
    name: str, parameters: Parameters, given: Sequence[str], kwargs: Mapping[str, Any], kwargs_key: str
) -> None:
    """
    Raises:
        ConfigError: a parameter is missing in `given` and `kwargs`, or one of `kwargs` is none.
    """
    if missing := [each for each in parameters.required if each not in (*given, *kwargs)]:
        raise ConfigError(
            f"{name} needs {', '.join(missing)}, and is given {', '.join(given)}; other values are given with {kwargs_key}, "
            "columns of the data with data.reference_fields"
        )
    if unknown := [each for each in kwargs if not parameters.takes(each)]:
        raise ConfigError(
            f"{kwargs_key}.{unknown[0]}: the function has no such parameter, only {', '.join(parameters.names)}"
        )


async def _outcome(pool: ProcessPool, limit: TimeLimit, what: Callable[..., Any], *arguments: Any) -> Any:
    """What a worker answers.

    Raises:
        RewardError: it did not.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return await asyncio.wrap_future(pool.schedule(what, arguments, timeout=limit.seconds))
        except TimeoutError:
            raise RewardError(f"did not return within {limit.key} = {limit.seconds:g}") from None
        except ProcessExpired as error:
            if attempt == _ATTEMPTS:
                raise RewardError(f"ended its process {attempt} times, with exit code {error.exitcode}") from None
        except BrokenProcessPool as error:
            raise RewardError(f"has no processes to run in: {error}") from None
    raise AssertionError("unreachable")


def _started_pool(workers: int) -> ProcessPool:
    """In processes made anew: a copy of this one would have its sockets."""
    return ProcessPool(max_workers=workers, initializer=begin, context=multiprocessing.get_context("spawn"))
