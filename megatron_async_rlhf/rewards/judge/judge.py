"""A judge: compares two answers to a prompt, or rates one."""

import asyncio
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from jinja2.sandbox import SandboxedEnvironment

from megatron_async_rlhf.config.judge import JudgeKeys
from megatron_async_rlhf.environment import is_ignored
from megatron_async_rlhf.errors import ConfigError, JudgeError
from megatron_async_rlhf.rewards.judge.answers import Answer, AnswerStore, key_of
from megatron_async_rlhf.rewards.judge.endpoint import Endpoint
from megatron_async_rlhf.rewards.judge.verdict import read_number, read_preference

_SEEDS = 2  # an answer that says nothing is asked for once more


class Comparison(NamedTuple):
    """Of answers a and b.

    Attributes:
        score: 1 if a is better, 0 if b is, 0.5 if the judge calls it a tie or its answer depends on the order.
        decided: whether the score is not 0.5.
    """

    score: float
    decided: bool


class Judge:
    """Asks nothing twice: not in another run with the same cache, not for equal requests at the same time.

    There is nothing to close. One judge belongs to one event loop.
    """

    def __init__(self, keys: JudgeKeys, *, cache: Path, key: str = "judge") -> None:
        """
        Args:
            cache: where answers are kept if `keys.cache` does not say.
            key: of `keys` in the configuration, for messages.

        Raises:
            ConfigError: there is no such template, or it is none.
        """
        self._keys = keys
        self._key = key
        self._store = AnswerStore(keys.cache or cache)
        self._endpoint = Endpoint(keys, self._store, key)
        self._template = _template(keys, key)
        self._under_way: dict[str, asyncio.Task[Answer]] = {}

    async def compare(self, prompt: str, a: str, b: str, *, solution: str | None = None) -> Comparison:
        """Which of two answers is better; of equal ones neither, and nobody is asked.

        Raises:
            JudgeError: there is no verdict. JudgeBudgetError: nothing more may be asked.
        """
        self._check_form("pairwise")
        if a == b:
            return Comparison(0.5, False)
        first, *second = await asyncio.gather(
            self._prefers(prompt, a, b, solution), *([self._prefers(prompt, b, a, solution)] if self._keys.swap else [])
        )
        score = first if all(first == 1.0 - swapped for swapped in second) else 0.5
        return Comparison(score, score != 0.5)

    async def rate(self, prompt: str, answer: str, *, solution: str | None = None) -> float:
        """How good an answer is, in the judge's own range.

        Raises:
            JudgeError: there is no verdict. JudgeBudgetError: nothing more may be asked.
        """
        self._check_form("pointwise")
        low, high = self._keys.range
        question = self._question(prompt=prompt, answer=answer, solution=solution, low=f"{low:g}", high=f"{high:g}")
        return await self._verdict(prompt, question, lambda text: read_number(self._keys, text))

    async def _prefers(self, prompt: str, a: str, b: str, solution: str | None) -> float:
        question = self._question(prompt=prompt, a=a, b=b, solution=solution)
        return await self._verdict(prompt, question, lambda text: read_preference(self._keys, text))

    async def _verdict(self, prompt: str, question: str, read: Callable[[str], float | None]) -> float:
        keys = self._keys
        name = f"judge {keys.model} at {keys.url}"
        for seed in range(keys.seed, keys.seed + _SEEDS):
            try:
                answer = await self._answer(self._request(question, seed))
            except JudgeError as error:
                raise type(error)(f"{name}: {error}") from None
            if (verdict := read(answer.text)) is not None:
                return verdict
        cut = f", cut off at {self._key}.max_tokens = {keys.max_tokens}," if answer.cut else ""
        raise JudgeError(
            f"{name}: no verdict can be read from its answer{cut} {_end(answer.text)!r} on the prompt {prompt[:40]!r}; look "
            f"at {self._key}.template and {'json_key' if keys.json_key else 'pattern'}"
        )

    def _request(self, question: str, seed: int) -> dict[str, Any]:
        keys = self._keys
        request = {
            "model": keys.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": keys.temperature,
            "max_tokens": keys.max_tokens,
            "seed": seed,
        } | keys.extra
        return {name: value for name, value in request.items() if value is not None}

    async def _answer(self, request: Mapping[str, Any]) -> Answer:
        key = key_of(request)
        if (task := self._under_way.get(key)) is None:
            task = self._under_way[key] = asyncio.create_task(self._find_or_ask(request))
            task.add_done_callback(lambda done: self._finish(key, done))
        return await asyncio.shield(task)  # others may wait for it too, and it is paid for

    def _finish(self, key: str, task: asyncio.Task[Answer]) -> None:
        del self._under_way[key]
        if not task.cancelled():
            task.exception()  # it may be that nobody waits any more

    async def _find_or_ask(self, request: Mapping[str, Any]) -> Answer:
        found = await self._store.find(request)
        return await self._endpoint.ask(request) if found is None else found

    def _question(self, **values: Any) -> str:
        try:
            return self._template.render(**values)
        except Exception as error:  # a template can do nearly anything
            raise JudgeError(f"{self._key}.template = {self._keys.template} cannot be used: {error}") from None

    async def settled(self) -> None:
        """Wait for the answers to all that has been asked so far, which is paid for: they are kept, or have failed."""
        if self._under_way:
            await asyncio.wait(list(self._under_way.values()))

    def _check_form(self, form: str) -> None:
        if self._keys.form != form:
            raise ValueError(f"{self._key}.form is {self._keys.form}, not {form}")


def check_api_key(keys: JudgeKeys, key: str) -> None:
    """
    Raises:
        ConfigError: the variable with the key is not set, or does not reach the processes of a run.
    """
    name = keys.api_key_env
    if name is None:
        return
    if not os.environ.get(name):
        raise ConfigError(f"{key}.api_key_env = {name}: there is no such variable here; export {name}=...")
    if is_ignored(name):
        raise ConfigError(f"{key}.api_key_env = {name}: variables of that name do not reach a run; use another name")


def check_template(keys: JudgeKeys, key: str) -> None:
    """
    Raises:
        ConfigError: there is no such file, it is no template, or it leaves out what is to be judged.
    """
    shown = {"pairwise": ("prompt", "a", "b"), "pointwise": ("prompt", "answer")}[keys.form]
    marks = {name: f"<{name}>" for name in shown}
    try:
        text = _template(keys, key).render(**marks, solution="", low="1", high="10")
    except jinja2.TemplateError as error:
        raise ConfigError(f"{key}.template = {keys.template} cannot be used: {error}") from None
    if missing := [name for name, mark in marks.items() if mark not in text]:
        raise ConfigError(f"{key}.template = {keys.template} does not show {', '.join(missing)} to the judge")


def _template(keys: JudgeKeys, key: str) -> jinja2.Template:
    path = keys.template or Path(__file__).with_name(f"{keys.form}.jinja")
    environment = SandboxedEnvironment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    try:
        return environment.from_string(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, jinja2.TemplateError) as error:
        raise ConfigError(f"{key}.template = {path} cannot be used: {error}") from None


def _end(text: str) -> str:
    return text if len(text) <= 200 else "..." + text[-200:]
