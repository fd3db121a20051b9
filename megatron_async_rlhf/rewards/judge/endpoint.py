"""One chat endpoint: requests with time limits, tried again while that can help, told in this project's errors."""

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from email.utils import parsedate_to_datetime
from typing import Any

import aiohttp
import msgspec
from msgspec import Struct
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    stop_before_delay,
    wait_exponential,
    wait_random,
)

from megatron_async_rlhf.config.judge import JudgeKeys
from megatron_async_rlhf.errors import JudgeError
from megatron_async_rlhf.rewards.judge.answers import Answer, AnswerStore

_AGAIN = {408, 425, 429}  # and all from 500
_NOT_WORKED_ON = {429, 503}
_wait = wait_exponential(multiplier=0.5, max=30.0) + wait_random(0.0, 0.5)


class _Message(Struct):
    content: str | None = None


class _Choice(Struct):
    message: _Message
    finish_reason: str | None = None


class _Usage(Struct):
    total_tokens: int = 0


class _Completion(Struct):
    choices: list[_Choice]
    usage: _Usage | None = None


class _Passing(Exception):
    """Something that may be better at the next try, which should not be before `retry_after_s`."""

    def __init__(self, what: str, retry_after_s: float = 0.0) -> None:
        super().__init__(what)
        self.retry_after_s = retry_after_s


class Endpoint:
    """Asks, pays, and keeps what it is answered.

    When the endpoint says when it wants to be asked again (429 with Retry-After), no request is sent before.
    """

    def __init__(self, keys: JudgeKeys, store: AnswerStore, key: str) -> None:
        """
        Args:
            key: of `keys` in the configuration.
        """
        self._keys, self._store, self._key = keys, store, key
        self._places = asyncio.Semaphore(keys.concurrency)
        self._session: aiohttp.ClientSession | None = None
        self._users = 0
        self._quiet_until = 0.0  # of the event loop's clock

    async def ask(self, request: Mapping[str, Any]) -> Answer:
        """
        Raises:
            JudgeBudgetError: there is no money left.
            JudgeError: the endpoint refuses, or has not answered within `give_up_s`.
        """
        keys = self._keys
        wrong: list[str] = []  # of each try
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(_Passing),
            stop=stop_before_delay(keys.give_up_s),
            wait=_next_wait,
            sleep=self._sleep,
            after=lambda state: wrong.append(str(state.outcome and state.outcome.exception())),
            reraise=True,
        )
        async with self._places, self._http() as http:
            in_vain = f"no answer within {self._key}.give_up_s = {keys.give_up_s:g}"
            try:
                async with asyncio.timeout(keys.give_up_s):
                    return await retrying(self._try, http, request)
            except _Passing as error:
                tries = retrying.statistics["attempt_number"]
                raise JudgeError(f"{in_vain}, which another try would pass; the last of {tries}: {error}") from None
            except TimeoutError:
                last = f"; the last of {len(wrong)} tries that ended: {wrong[-1]}" if wrong else ""
                raise JudgeError(in_vain + last) from None

    async def _try(self, http: aiohttp.ClientSession, request: Mapping[str, Any]) -> Answer:
        await self._sleep(0.0)  # another request may have been told to wait
        await self._store.spend_call(self._keys.budget, f"{self._key}.budget")
        url, limit = f"{self._keys.url}/chat/completions", aiohttp.ClientTimeout(total=self._keys.timeout_s)
        try:
            async with http.post(url, json=request, headers=self._headers(), timeout=limit) as response:
                status, content = response.status, await response.read()
                retry_after_s = _seconds(response.headers.get("Retry-After"))
        except TimeoutError:
            raise _Passing(f"no answer within {self._key}.timeout_s = {self._keys.timeout_s:g}") from None
        except aiohttp.ClientConnectorError as error:
            await self._store.give_back_call()
            raise _Passing(f"no connection: {error}") from None
        except aiohttp.ClientError as error:
            raise _Passing(f"the connection broke: {type(error).__name__} {error}") from None
        if status == 200:
            return await self._kept(request, content)
        if status in _NOT_WORKED_ON:
            await self._store.give_back_call()
        said = f"it answered {status}: {_shown(content)}"
        if status in _AGAIN or status >= 500:
            self._quiet_until = max(self._quiet_until, asyncio.get_running_loop().time() + retry_after_s)
            raise _Passing(said, retry_after_s)
        if status in (401, 403):
            name = self._keys.api_key_env
            said += f"; {self._key}.api_key_env is " + ("not set" if name is None else f"{name}: look at its value")
        raise JudgeError(said)

    async def _kept(self, request: Mapping[str, Any], content: bytes) -> Answer:
        try:
            completion = msgspec.convert(json.loads(content), _Completion)  # msgspec's own reader refuses surrogates
            choice = completion.choices[0]
        except (ValueError, RecursionError, msgspec.MsgspecError, IndexError):
            raise _Passing(f"it answered 200 with something that is no chat completion: {_shown(content)}") from None
        text = (choice.message.content or "").encode(errors="replace").decode()  # a lone surrogate cannot be stored
        answer = Answer(text=text, cut=choice.finish_reason == "length")
        await self._store.keep(request, answer, completion.usage.total_tokens if completion.usage else 0)
        return answer

    def _headers(self) -> dict[str, str]:
        name = self._keys.api_key_env
        return {} if name is None else {"Authorization": f"Bearer {os.environ.get(name, '')}"}

    async def _sleep(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        while (left := max(until, self._quiet_until) - loop.time()) > 0:
            await asyncio.sleep(left)

    @asynccontextmanager
    async def _http(self) -> AsyncIterator[aiohttp.ClientSession]:
        """There is a session for as long as anything is under way, so that nobody has to close it."""
        if self._session is None:
            self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), trust_env=True)
        session = self._session
        self._users += 1
        try:
            yield session
        finally:
            self._users -= 1
            if not self._users:
                self._session = None
                await session.close()


def _next_wait(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome is not None else None
    assert isinstance(error, _Passing)  # nothing else is tried again
    return max(error.retry_after_s, _wait(state))


def _seconds(retry_after: str | None) -> float:
    """From now on, of the header, which has seconds or a date; 0 if it says nothing that can be used."""
    if retry_after is None:
        return 0.0
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return 0.0


def _shown(content: bytes) -> str:
    return " ".join(content.decode(errors="replace").split())[:200]
