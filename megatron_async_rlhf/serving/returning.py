"""Waits until a server that was lost answers again, and tells when its process does nothing although it may be alive."""

import asyncio
from collections.abc import Callable
from typing import Protocol

from megatron_async_rlhf.errors import GeneratorError, GeneratorSilentError

_WATCH_S = 0.5
_RESTART_S = 5.0  # so soon after its loss a server's process has been started again


class Probed(Protocol):
    """A server."""

    name: str

    async def probe(self) -> None:
        """Return if it can work now.

        Raises:
            GeneratorSilentError: it did not answer in time.
            GeneratorError: nobody is there, or the server is still starting.
        """
        ...


async def wait_for_return(
    server: Probed,
    *,
    is_lost: Callable[[], bool],
    return_timeout_s: float,
    silence_limit_s: float,
    on_silent: Callable[[GeneratorSilentError], None],
    section: str = "generator",
) -> bool:
    """Whether a lost server has answered a probe; False if it is not lost any more by then.

    Args:
        return_timeout_s: how long its start may take: `start_timeout_s` in `section` of the configuration.
        silence_limit_s: how long it may leave probes unanswered.
        on_silent: told whenever one of them is over, for whoever owns the process.
    """
    clock = asyncio.get_running_loop().time
    lost = heard = clock()  # a refused connection is a sign of life: something is being started
    while is_lost():
        try:
            await server.probe()
        except GeneratorSilentError as error:
            if clock() - heard >= silence_limit_s:
                on_silent(GeneratorSilentError(str(error), silent_s=clock() - heard))
                heard = clock()
        except GeneratorError:
            heard = clock()
        else:
            return is_lost()
        if clock() - lost >= return_timeout_s:
            why = f"{server.name}: not ready within {section}.start_timeout_s = {return_timeout_s:g}"
            on_silent(GeneratorSilentError(why, silent_s=clock() - lost - _RESTART_S))
            lost = clock()
        await asyncio.sleep(_WATCH_S)
    return False
