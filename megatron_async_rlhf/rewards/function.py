"""A user's own function as a reward, called in worker processes with all completions of a prompt.

The event loop only waits. A function that fails ends the run, or earns its completions 0 (`reward.on_error`).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_async_rlhf.config.rewards import FunctionRewardSection
from megatron_async_rlhf.errors import ConfigError, RewardError
from megatron_async_rlhf.rewards.base import Score
from megatron_async_rlhf.rewards.failing import plain_scores, scores_after
from megatron_async_rlhf.rewards.function_worker import call, describe
from megatron_async_rlhf.rewards.workers import TimeLimit, Workers, call_apart
from megatron_async_rlhf.types import Completion, Prompt
from megatron_async_rlhf.user_functions import Parameters, file_of


class FunctionReward:
    """Scores that a function gives to all completions of a prompt at once.

    It gets `prompt` (the text without template), `completions` (their texts), the columns of the prompt's record by
    their names, and `reward.kwargs`, each only if it has a parameter for it. The workers start with the first prompt.
    """

    def __init__(self, section: FunctionRewardSection, key: str = "reward") -> None:
        self._section, self._key = section, key
        self._name = f"reward function {section.function}"
        self._workers = Workers(section.workers, TimeLimit(f"{key}.timeout_s", section.timeout_s))

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
        on_error = self._section.on_error
        try:
            scores = await self._call(given)
        except RewardError as error:
            failure = f"{self._name} {error}; the prompt is {prompt.name}"
            return scores_after(failure, len(completions), on_error, self._key, way_out="Correct the function")
        return plain_scores(scores, on_error)

    def sources(self) -> list[Path]:
        path = file_of(self._section.function)
        return [] if path is None else [path]

    def close(self) -> None:
        self._workers.close()

    async def _call(self, given: Mapping[str, Any]) -> list[float]:
        """Raises RewardError: what went wrong, to follow the function's name."""
        answer = await self._workers.call(call, self._section.function, given)
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
    try:
        answer = call_apart(limit, describe, function)
    except RewardError as error:
        answer = str(error)
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
