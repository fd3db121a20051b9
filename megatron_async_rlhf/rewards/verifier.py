"""A verifier that may take long over an odd text, or never end: worker processes call it for each completion.

A text over which it fails earns 0 and is counted, or ends the run (`reward.on_error`).
"""

import asyncio
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from megatron_async_rlhf.config.reward_keys import VerifierKeys
from megatron_async_rlhf.errors import ConfigError, DataError, RewardError
from megatron_async_rlhf.rewards.base import Score, solution_of
from megatron_async_rlhf.rewards.failing import failed_score
from megatron_async_rlhf.rewards.workers import TimeLimit, Workers
from megatron_async_rlhf.types import Completion, Prompt
from megatron_async_rlhf.user_functions import raised

_PROMPTS_OF_A_CALL = 100  # that are checked before the run; one takes milliseconds


class Task(NamedTuple):
    """What a completion is verified against: the text and the reference of its prompt."""

    text: str
    reference: Mapping[str, Any]


class Verification(Protocol):
    """Code that runs in the workers. It is sent to them, so it holds settings only and loads its libraries there."""

    def check(self, task: Task) -> str | None:
        """What is wrong with a prompt, if it cannot be scored."""
        ...

    def judge(self, task: Task, text: str) -> tuple[float, dict[str, float]]:
        """The reward of a completion, and its metrics."""
        ...


class WorkerVerifier:
    """Scores each completion by itself, by what a verification in a worker says of it."""

    def __init__(self, section: VerifierKeys, verification: Verification, key: str = "reward") -> None:
        self._section, self._verification, self._key = section, verification, key
        self._workers = Workers(section.workers, TimeLimit(f"{key}.timeout_s", section.timeout_s))

    def check(self, prompt: Prompt) -> None:
        """Raises DataError if it has no solution and needs one. `check_prompts` does the rest, with the libraries loaded."""
        if self._section.reads_solution:
            solution_of(prompt, f"reward.type = {self._section.type}")

    async def score(self, prompt: Prompt, completions: Sequence[Completion]) -> list[Score]:
        return list(await asyncio.gather(*(self._judge(prompt, completion) for completion in completions)))

    def sources(self) -> list[Path]:
        return [Path(inspect.getsourcefile(type(self._verification)) or "")]

    def close(self) -> None:
        self._workers.close()

    async def _judge(self, prompt: Prompt, completion: Completion) -> Score:
        may_fail = self._section.on_error == "zero"
        try:
            answer = await self._workers.call(
                _judge, self._verification, Task(prompt.text, prompt.reference), completion.text
            )
            if isinstance(answer, str):
                raise RewardError(answer)
        except RewardError as error:
            failure = f"reward {self._section.title} {error}; the prompt is {prompt.name}, the completion {_cut(completion.text)}"
            if not may_fail:
                raise RewardError(f"{failure}. Set {self._key}.on_error = zero to continue without it") from None
            return failed_score(failure, self._section.metrics)
        reward, metrics = answer
        return Score(reward=reward, metrics=metrics | ({"reward_failed": 0.0} if may_fail else {}))


def check_prompts(key: str, section: VerifierKeys, verification: Verification, prompts: Sequence[Prompt]) -> None:
    """Find out, in a process of its own, whether all these prompts can be scored.

    Args:
        key: of `section` in the configuration.

    Raises:
        DataError: names the first that cannot.
        ConfigError: the verifier cannot be loaded, or gives no answer.
    """

    async def check() -> None:
        for first in range(0, len(prompts), _PROMPTS_OF_A_CALL):
            some = prompts[first : first + _PROMPTS_OF_A_CALL]
            found = await workers.call(_check, verification, [Task(p.text, p.reference) for p in some])
            if isinstance(found, str):
                raise RewardError(found)
            if found is not None:
                place, wrong = found
                raise DataError(f"{some[place].name}: {wrong}")

    workers = Workers(1, TimeLimit(f"{key}.timeout_s", section.timeout_s))
    try:
        asyncio.run(check())
    except RewardError as error:
        raise ConfigError(f"{key}.type = {section.type} {error}") from None
    finally:
        workers.close()


def _check(verification: Verification, tasks: list[Task]) -> tuple[int, str] | str | None:
    """In a worker. The first task that is wrong, or what the verification did instead of an answer."""
    try:
        answers = ((place, verification.check(task)) for place, task in enumerate(tasks))
        return next(((place, wrong) for place, wrong in answers if wrong is not None), None)
    except BaseException as error:  # an exception may not survive the way to another process
        return raised(error)


def _judge(verification: Verification, task: Task, text: str) -> tuple[float, dict[str, float]] | str:
    """In a worker. Reward and metrics, or what the verification did instead."""
    try:
        return verification.judge(task, text)
    except BaseException as error:
        return raised(error)


def _cut(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
