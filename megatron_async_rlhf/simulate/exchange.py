"""Where the simulated learner and generators meet to hand over weights, as the real ones do over the network.

    meet (JoinTransfer, join_transfer) ─> begin (PushWeights) + receive, from all that met ─> `push_s` later: arrived

One member that dies takes the push with it: the others learn of it at once, or after `timeout_s` if it only hangs.
"""

import asyncio
from collections.abc import Sequence

from megatron_async_rlhf.errors import GeneratorError, TransferError


class Push:
    """One push among those that met."""

    def __init__(self, version: int, members: frozenset[str], push_s: float, timeout_s: float) -> None:
        self.version = version
        self._loop = asyncio.get_running_loop()
        self._missing = set(members)
        self._push_s = push_s
        self._outcome: asyncio.Future[str] = self._loop.create_future()  # what went wrong; empty if nothing
        self._timer = self._loop.call_later(timeout_s, self.fail, f"nothing moved for {timeout_s:g} s")

    async def receive(self, name: str) -> str:
        """What went wrong, if anything, once it is over."""
        self._missing.discard(name)
        if not self._missing and not self._outcome.done():
            self._timer.cancel()
            self._timer = self._loop.call_later(self._push_s, self.fail, "")
        return await self.outcome()

    async def outcome(self) -> str:
        return await asyncio.shield(self._outcome)

    def fail(self, why: str) -> None:
        if not self._outcome.done():
            self._timer.cancel()
            self._outcome.set_result(why)


class Exchange:
    """One at a time: those that met last, and their push."""

    def __init__(self, push_s: float, timeout_s: float) -> None:
        self._push_s, self._timeout_s = push_s, timeout_s
        self._session = ""
        self._come: set[str] = set()
        self._met: asyncio.Future[str] | None = None
        self.members: frozenset[str] = frozenset()
        self.push: Push | None = None

    async def meet_learner(self, session: str, generators: Sequence[str]) -> None:
        """Raises TransferError if somebody does not come."""
        if self.push is not None:
            self.push.fail("the members met anew")
        self.members, self.push = frozenset(generators), None
        why = await self._meet(session, "learner")
        if why:
            raise TransferError(f"rendezvous: {why}")

    async def meet(self, session: str, name: str) -> None:
        """Raises GeneratorError if somebody does not come."""
        why = await self._meet(session, name)
        if why:
            raise GeneratorError(f"{name}: rendezvous: {why}")

    def begin(self, version: int) -> None:
        self.push = Push(version, self.members, self._push_s, self._timeout_s)

    async def receive(self, name: str) -> int:
        """The version that arrived. Raises GeneratorError if none did."""
        if name not in self.members or self.push is None:
            raise GeneratorError(f"{name}: no push is under way that it is part of")
        push = self.push
        why = await push.receive(name)
        if why:
            raise GeneratorError(f"{name}: {why}")
        return push.version

    def lose(self, name: str) -> None:
        """A member's process has ended."""
        if name in self.members and self.push is not None:
            self.push.fail(f"receive from {name} failed: the connection is gone")

    async def _meet(self, session: str, name: str) -> str:
        met = self._met
        if met is None or self._session != session:
            self._session, self._come = session, set()
            self._met = met = asyncio.get_running_loop().create_future()
            asyncio.get_running_loop().call_later(self._timeout_s, self._give_up, met)
        self._come.add(name)
        if "learner" in self._come and self.members < self._come and not met.done():
            met.set_result("")
        return await asyncio.shield(met)

    def _give_up(self, met: asyncio.Future) -> None:
        if not met.done():
            missing = ", ".join(sorted(self.members - self._come)) or "somebody"
            met.set_result(f"{missing} did not come within {self._timeout_s:g} s")
