"""Tells a server that has much to do from one that hangs: the first answers somebody, now and then."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


class Silence:
    """Of one server: how long it has worked on requests without answering any.

    A request that waits behind a thousand others is in good hands as long as those are answered.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._broken = float("-inf")  # when it last was

    def broken(self) -> None:
        """The server has given a sign of life."""
        self._broken = asyncio.get_running_loop().time()

    async def wait(self, answer: Awaitable[T]) -> T:
        """What comes, whatever it is.

        Raises:
            TimeoutError: since this request was made nothing has come for `limit_s`, to anybody; it is cancelled.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        task = asyncio.ensure_future(answer)
        try:
            while not task.done():
                left = max(began, self._broken) + self.limit_s - loop.time()
                if left <= 0:
                    raise TimeoutError
                await asyncio.wait([task], timeout=left)
            self.broken()
            return task.result()
        finally:
            task.cancel()
