"""Tells a server that has much to do from one that hangs: the first answers somebody, now and then."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from megatron_async_rlhf.errors import GeneratorGoneError, GeneratorSilentError

T = TypeVar("T")


class StallDetector:
    """Of one server: how long it has worked on requests without answering any.

    A request that waits behind a thousand others is in good hands as long as those are answered. While the server is
    paused nothing is expected of it.
    """

    def __init__(self, name: str, limit_s: float, *, section: str = "generator") -> None:
        """
        Args:
            section: of the configuration, where `request_timeout_s` stands.
        """
        self._name = name
        self._section = section
        self._limit_s = limit_s
        self._broken = float("-inf")  # when it last was
        self._paused = False
        self._waiting: set[asyncio.Future] = set()

    def pause(self) -> None:
        self._paused = True

    def resume(self) -> None:
        self._paused = False
        self._broken = asyncio.get_running_loop().time()

    def give_up(self) -> None:
        """Whoever waits for the server now would wait in vain."""
        for task in self._waiting:
            task.cancel()

    async def unless_given_up(self, answer: Awaitable[T]) -> T:
        """What comes, however long it takes.

        Raises:
            GeneratorGoneError: the server was given up first; the call is cancelled.
        """
        task = asyncio.ensure_future(answer)
        self._waiting.add(task)
        try:
            await asyncio.wait([task])
            return self._result(task)
        finally:
            self._waiting.discard(task)
            task.cancel()

    async def wait(self, answer: Awaitable[T]) -> T:
        """What comes, whatever it is.

        Raises:
            GeneratorSilentError: since this request was made nothing has come for the limit, to anybody; it is cancelled.
            GeneratorGoneError: the server was given up meanwhile; the request is cancelled.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        task = asyncio.ensure_future(answer)
        self._waiting.add(task)
        try:
            while not task.done():
                left = self._limit_s if self._paused else max(began, self._broken) + self._limit_s - loop.time()
                if left <= 0:
                    raise GeneratorSilentError(
                        f"{self._name}: has answered no request for {self._limit_s:g} s; see its log, or raise "
                        f"{self._section}.request_timeout_s",
                        silent_s=self._limit_s,
                    )
                await asyncio.wait([task], timeout=left)
            if not task.cancelled():
                self._broken = loop.time()  # an error is an answer too
            return self._result(task)
        finally:
            self._waiting.discard(task)
            task.cancel()

    def _result(self, task: asyncio.Future[T]) -> T:
        if task.cancelled():
            raise GeneratorGoneError(f"{self._name}: was given up with all its requests")
        return task.result()
