"""One server's HTTP side: requests with time limits, and what became of it told in this project's errors."""

import asyncio
import contextlib
import errno
import ssl
from collections.abc import Callable
from typing import Any

import aiohttp
import msgspec

from megatron_async_rlhf.errors import GeneratorError, GeneratorGoneError, GeneratorSilentError
from megatron_async_rlhf.limits import open_files
from megatron_async_rlhf.run_secret import request_headers
from megatron_async_rlhf.run_tls import client_tls

NO_LIMIT = 0.0
CLASSIFY = "/classify"
# `generator/vllm/routes.py`
SAMPLE, PAUSE, RECEIVE = "/async_rlhf/sample", "/async_rlhf/pause", "/async_rlhf/weights"
_TAKE_PLACES = {"/inference/v1/generate", SAMPLE, CLASSIFY}
_ENDING = b"Server shutting down"  # what vLLM's engine says to whatever it is asked after it was told to end
# Of a connection that this machine does not even try to make: the server has nothing to do with it.
_OURS = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL}


class Connection:
    """JSON in, JSON out. A request that is cancelled here is cancelled at the server too.

    Attributes:
        places: requests for samples or scores that may be under way at once; others wait for one to end, in order. All
            other requests are sent at once.
    """

    def __init__(
        self,
        name: str,
        url: str,
        timeout_s: float,
        places: int = 2**16,
        *,
        section: str = "generator",
        ours: bool = True,
    ) -> None:
        """
        Args:
            ours: it belongs to this run, and is shown the secret; anybody else's must not be.
            section: of the configuration, where `request_timeout_s` and `max_concurrent` stand.
        """
        self._name = name
        self._section = section
        self._timeout_s = timeout_s
        self.places = places
        self._free_places = asyncio.Semaphore(places)
        # As many connections as requests, so that all that have a place can be queued at once. Idle ones are given up
        # long before the server closes them (`server_environment`): a request sent on a connection that is just being
        # closed would fail although both sides are well. No proxy is ever asked, whatever the environment says.
        self._http = aiohttp.ClientSession(
            url,
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=5.0, ssl=_tls(url, ours)),
            trust_env=False,
            headers=request_headers() if ours else {},
        )

    async def get(self, path: str, answer: Any = dict[str, Any]) -> Any:
        return await self._request("GET", path, {}, self._timeout_s, answer)

    async def post(
        self, path: str, body: dict | None = None, timeout_s: float | None = None, answer: Any = dict[str, Any]
    ) -> Any:
        """
        Args:
            answer: type of what comes back. A struct takes what it has fields for and skips the rest, which is several
                times as fast as a tree of dictionaries.

        Raises:
            GeneratorGoneError: it ended or is about to, or its engine did.
            GeneratorSilentError: it did not answer in time.
            GeneratorError: it refused.
        """
        limit = self._timeout_s if timeout_s is None else timeout_s
        return await self._request("POST", path, {"json": body}, limit, answer)

    async def post_packed(self, path: str, body: msgspec.Struct, answer: Any) -> Any:
        """As `post`, in MessagePack both ways, without a limit on time."""
        content = {"data": msgspec.msgpack.encode(body)}
        return await self._request("POST", path, content, NO_LIMIT, answer, decode=msgspec.msgpack.decode)

    async def has_engine(self) -> bool:
        """Whether the server answers and believes its engine alive, which it does of one that hangs too."""
        try:
            async with self._http.get("/health", timeout=aiohttp.ClientTimeout(total=5.0)) as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError) as error:
            self._refuse_if_ours(error)
            return False

    async def close(self) -> None:
        await self._http.close()

    async def _request(
        self,
        method: str,
        path: str,
        body: dict[str, Any],
        limit: float,
        answer: Any,
        decode: Callable[..., Any] = msgspec.json.decode,
    ) -> Any:
        """
        Args:
            body: as `aiohttp` takes it, `json` or `data`.
        """
        name, route = self._name, path.partition("?")[0]
        place = self._free_places if path in _TAKE_PLACES else contextlib.nullcontext()
        try:
            async with (
                place,
                self._http.request(
                    method, path, **body, timeout=aiohttp.ClientTimeout(total=limit or None)
                ) as response,
            ):
                status, content = response.status, await response.read()
        except TimeoutError:
            raise GeneratorSilentError(
                f"{name}: no answer to {route} within {limit:g} s; see its log, or raise {self._section}.request_timeout_s",
                silent_s=limit,
            ) from None
        except aiohttp.ClientError as error:
            self._refuse_if_ours(error)
            raise GeneratorGoneError(f"{name}: {route} failed, the server is gone ({type(error).__name__})") from None
        if status == 200:
            try:
                return decode(content, type=answer) if content else {}
            except msgspec.MsgspecError as error:
                raise GeneratorError(f"{name}: {route} answered something else than expected: {error}") from None
        if status >= 500 and _ENDING in content:
            raise GeneratorGoneError(f"{name}: {route} failed, the server was told to end")
        if status >= 500 and not await self.has_engine():  # a server outlives its engine by a moment
            raise GeneratorGoneError(f"{name}: {route} failed, its engine died; see its log")
        detail = " ".join(content.decode(errors="replace").split())[:300]
        raise GeneratorError(f"{name}: {route} answered {status}: {detail}")

    def _refuse_if_ours(self, error: Exception) -> None:
        """A limit of this machine must not be taken for a server that is gone."""
        number = getattr(error, "errno", None)
        if number in (errno.EMFILE, errno.ENFILE):
            raise GeneratorError(
                f"{self._name}: no further connection, the limit of open files ({open_files()}) is reached; raise it "
                f"(ulimit -n), or lower {self._section}.max_concurrent"
            ) from None
        if number in _OURS:
            raise GeneratorError(f"{self._name}: this machine makes no further connection ({error})") from None


def _tls(url: str, ours: bool) -> ssl.SSLContext | bool:
    """Whose certificates are trusted; True: those that this machine trusts."""
    return (client_tls() if ours and url.startswith("https:") else None) or True
