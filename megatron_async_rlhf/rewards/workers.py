"""Functions called in worker processes, each call with a time limit: what they do, or break, never holds up the caller.

call ──> a free worker calls the function ──> what it returns
                 │
                 ├── it takes too long, or the worker dies: the worker is replaced
                 └── a worker dies that had nothing to do, or nothing comes from any: all of them are replaced
"""

import asyncio
import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

from pebble import ProcessExpired, ProcessPool

from megatron_async_rlhf.clock import now
from megatron_async_rlhf.errors import GeneratorGoneError, RewardError
from megatron_async_rlhf.serving.silence import StallDetector

# A worker may be ended by whoever ends a whole job, which tells every process of it.
_ATTEMPTS = 2
_POOLS = 3  # of a call; what it is called with has nothing to do with it if one breaks
# After a time limit: processes may take long to start. If nothing has come after it, pebble hangs itself.
_SLACK_S = 60.0
_LOOKS = 10  # at a call, within its time limit: whether a worker has it


class TimeLimit(NamedTuple):
    """Of one call, and the key of the configuration that says so."""

    key: str
    seconds: float


class Workers:
    """They start with the first call, and know nothing of this process: a copy of it would have its sockets."""

    def __init__(self, count: int, limit: TimeLimit) -> None:
        self._count, self._limit = count, limit
        self._pool: ProcessPool | None = None
        self._starting = asyncio.Lock()
        self._silence = StallDetector("workers", limit.seconds + _SLACK_S)

    async def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What the function returns; it should not raise, as an exception may not survive the way between processes.

        Raises:
            RewardError: it did not return. The message follows the name of what was called.
        """
        expired = broken = 0
        while True:
            pool = await self._running()
            try:
                return await self._answer(self._schedule(pool, function, arguments))
            except TimeoutError:
                raise RewardError(f"did not return within {self._limit.key} = {self._limit.seconds:g}") from None
            except ProcessExpired as error:
                expired += 1
                if expired == _ATTEMPTS:
                    raise RewardError(f"ended its process {expired} times, with exit code {error.exitcode}") from None
            except BrokenProcessPool as error:
                broken += 1
                self._give_up(pool)
                if broken == _POOLS:
                    raise RewardError(f"has no processes to run in: {error}") from None

    def close(self) -> None:
        if self._pool is not None:
            _end(self._pool)
            self._pool = None

    def _schedule(self, pool: ProcessPool, function: Callable[..., Any], arguments: Sequence[Any]) -> Future[Any]:
        try:
            return pool.schedule(function, arguments)
        except RuntimeError as error:  # as pebble says it of a pool that broke before
            raise BrokenProcessPool(str(error)) from None

    async def _running(self) -> ProcessPool:
        async with self._starting:  # many calls may be the first
            if self._pool is None:
                self._pool = await asyncio.to_thread(self._start)
            return self._pool

    async def _answer(self, call: Future[Any]) -> Any:
        """What comes, after however many others.

        Raises:
            TimeoutError: a worker has had the call for longer than it may take.
            BrokenProcessPool: nothing has come for longer than any call may take.
        """
        try:
            return await self._silence.wait(self._in_time(call))
        except GeneratorGoneError:
            raise BrokenProcessPool(f"nothing has come from them for {self._limit.seconds + _SLACK_S:g} s") from None

    async def _in_time(self, call: Future[Any]) -> Any:
        """Pebble has time limits too, but by the time of day, which may be set."""
        answer, had_since = asyncio.wrap_future(call), None
        try:
            while not (await asyncio.wait([answer], timeout=self._limit.seconds / _LOOKS))[0]:
                if had_since is None:
                    had_since = now() if call.running() else None
                elif now() - had_since > self._limit.seconds:
                    raise TimeoutError
            return answer.result()
        finally:
            answer.cancel()  # ends the worker that has it; nothing once it is done

    def _give_up(self, pool: ProcessPool) -> None:
        """Unless another call has. Nobody waits until it has ended: it may hang."""
        if self._pool is pool:
            self._pool = None
            threading.Thread(target=_end, args=[pool], daemon=True).start()

    def _start(self) -> ProcessPool:
        spawn = multiprocessing.get_context("spawn")
        return ProcessPool(max_workers=self._count, initializer=_begin, context=spawn)


def call_apart(limit: TimeLimit, function: Callable[..., Any], *arguments: Any) -> Any:
    """One call in a process of its own, waited for. Raises RewardError as `Workers.call`."""
    workers = Workers(1, limit)
    try:
        return asyncio.run(workers.call(function, *arguments))
    finally:
        workers.close()


def _end(pool: ProcessPool) -> None:
    pool.stop()
    pool.join()


def _begin() -> None:
    """What the function prints must not get between the lines of the controller's standard output."""
    os.dup2(2, 1)
