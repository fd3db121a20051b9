"""How the tasks of the loop tell each other that something has changed."""

import asyncio
from collections.abc import Callable


class Signal:
    """Whoever changes shared state notifies; whoever waits looks again."""

    def __init__(self) -> None:
        self._condition = asyncio.Condition()

    async def wait_until(self, condition: Callable[[], object]) -> None:
        """Return once it holds; at once if it does already."""
        async with self._condition:
            await self._condition.wait_for(condition)

    async def notify(self) -> None:
        async with self._condition:
            self._condition.notify_all()
