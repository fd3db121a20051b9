"""All servers of one reward model as one: a group goes to whoever has the least to do, and elsewhere when that one dies.

    serving ──(gone, silent)──> lost ──(has scored a probe)──> serving

A group's scores come from one answer of one server: what a lost one still says is not listened to.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress

from megatron_async_rlhf.config.reward_model_section import RewardModelSection
from megatron_async_rlhf.errors import GeneratorError, GeneratorGoneError, GeneratorSilentError, RewardError
from megatron_async_rlhf.rewards.reward_server import RewardServer
from megatron_async_rlhf.serving.returning import wait_for_return
from megatron_async_rlhf.telemetry.busy import ServersBusy

_MOST_LOSSES = 4  # of a group that outlives so many servers is probably the reason
_POLL_S = 0.25


class RewardServers:
    """Servers of the same model, in the order of their names."""

    def __init__(
        self,
        servers: Sequence[RewardServer],
        section: RewardModelSection,
        *,
        key: str,
        busy: ServersBusy,
        on_silent: Callable[[str, GeneratorSilentError], None] = lambda name, error: None,
        on_note: Callable[[str], None] = lambda text: None,
    ) -> None:
        """
        Args:
            key: of `section` in the configuration.
            busy: told when each of them scores.
            on_silent: told of every server whose process may be alive, but does nothing, by its name.
            on_note: told who is gone and who is back.
        """
        self._servers, self._section, self._key = servers, section, key
        self._busy, self._on_silent, self._on_note = busy, on_silent, on_note
        self._under_way = {server.name: 0 for server in servers}  # sequences
        self._lost: set[str] = set()
        self._last_loss = "none answered"
        self._returned = asyncio.Condition()
        self._returns: set[asyncio.Task] = set()

    async def start(self) -> None:
        """Return once all of them score.

        Raises:
            RewardError: one does not within `start_timeout_s`, or refuses.
        """
        await asyncio.gather(*map(self._ready, self._servers))

    async def rejoin(self) -> None:
        """Find out which of them are still there; one that does not answer is lost, as one that is lost later."""

        async def ask(server: RewardServer) -> None:
            try:
                await server.probe()
            except GeneratorError as error:
                self._lose(server, GeneratorGoneError(str(error)))

        await asyncio.gather(*map(ask, self._servers))

    async def score(self, sequences: Sequence[list[int]]) -> list[float]:
        """A score for each sequence of token ids.

        Raises:
            RewardError: no server is left, and none came back in time; or all that were asked were lost.
            GeneratorError: a server refused, or gave what is no score.
        """
        for _ in range(_MOST_LOSSES):
            server = await self._least_loaded()
            self._under_way[server.name] += len(sequences)
            try:
                with self._busy.any, self._busy.at(server.name) as busy:
                    scores = await server.score(sequences)
                    busy.done(samples=len(sequences), tokens=sum(map(len, sequences)))
                return scores
            except GeneratorGoneError as error:
                self._lose(server, error)
            finally:
                self._under_way[server.name] -= len(sequences)
        raise RewardError(
            f"{_MOST_LOSSES} servers were lost one after the other while they scored it; if it takes longer than "
            f"{self._key}.request_timeout_s, raise that. The last one: {self._last_loss}"
        )

    async def close(self) -> None:
        for task in self._returns:
            task.cancel()
        for server in self._servers:
            await server.close()

    async def _ready(self, server: RewardServer) -> None:
        limit, failure = self._section.start_timeout_s, "it did not answer"
        with suppress(TimeoutError):
            async with asyncio.timeout(limit):
                while True:
                    try:
                        await server.probe()
                        return
                    except GeneratorGoneError as error:
                        failure = str(error)  # it is still starting
                    except GeneratorError as error:
                        raise RewardError(f"{error}; {self._key}.model cannot be served so") from None
                    await asyncio.sleep(_POLL_S)
        raise RewardError(
            f"{server.name} was not ready within {limit:g} s ({failure}); "
            f"{'see its log' if self._section.url is None else f'start it, or correct {self._key}.url'}, or raise "
            f"{self._key}.start_timeout_s"
        )

    async def _least_loaded(self) -> RewardServer:
        limit = self._section.start_timeout_s
        try:
            async with asyncio.timeout(limit), self._returned:
                await self._returned.wait_for(lambda: len(self._lost) < len(self._servers))
        except TimeoutError:
            names = ", ".join(server.name for server in self._servers)
            raise RewardError(
                f"no server of it is left ({names}) and none was back within {self._key}.start_timeout_s = {limit:g}; see "
                f"their logs. The last one: {self._last_loss}"
            ) from None
        serving = (server for server in self._servers if server.name not in self._lost)
        return min(serving, key=lambda server: self._under_way[server.name])

    def _lose(self, server: RewardServer, error: GeneratorGoneError) -> None:
        if server.name in self._lost:
            return  # many requests may have been lost with it
        self._last_loss = str(error)
        self._lost.add(server.name)
        self._on_note(f"{error}; what it was scoring goes to another server, or waits for this one")
        if isinstance(error, GeneratorSilentError):
            self._on_silent(server.name, error)
        server.give_up()
        task = asyncio.create_task(self._await_return(server))
        self._returns.add(task)
        task.add_done_callback(self._returns.discard)

    async def _await_return(self, server: RewardServer) -> None:
        await wait_for_return(
            server,
            is_lost=lambda: True,
            return_timeout_s=self._section.start_timeout_s,
            silence_limit_s=self._section.request_timeout_s,
            on_silent=lambda error: self._on_silent(server.name, error),
            section=self._key,
        )
        async with self._returned:
            self._lost.discard(server.name)
            self._returned.notify_all()
        self._on_note(f"{server.name} is back")
