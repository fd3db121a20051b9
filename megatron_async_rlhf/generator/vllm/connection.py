"""One server's HTTP side: requests with time limits, and what became of it told in this project's errors."""

from typing import Any

import aiohttp
import msgspec

from megatron_async_rlhf.errors import GeneratorError, GeneratorGoneError, GeneratorSilentError

NO_LIMIT = 0.0


class Connection:
    """JSON in, JSON out. A request that is cancelled here is cancelled at the server too."""

    def __init__(self, name: str, url: str, timeout_s: float) -> None:
        self._name = name
        self._timeout_s = timeout_s
        # As many connections as requests, so that all can be queued at once. Idle ones are given up long before the
        # server closes them (`server_environment`): a request sent on a connection that is just being closed would
        # fail although both sides are well.
        self._http = aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=5.0))

    async def get(self, path: str) -> dict[str, Any]:
        return await self._request("GET", path, None, self._timeout_s)

    async def post(
        self, path: str, body: dict | None = None, timeout_s: float | None = None, answer: Any = dict[str, Any]
    ) -> Any:
        """
        Args:
            answer: type of what comes back. A struct takes what it has fields for and skips the rest, which is several
                times as fast as a tree of dictionaries.

        Raises:
            GeneratorGoneError: it ended, or its engine did.
            GeneratorSilentError: it did not answer in time.
            GeneratorError: it refused.
        """
        return await self._request("POST", path, body, self._timeout_s if timeout_s is None else timeout_s, answer)

    async def has_engine(self) -> bool:
        """Whether the server answers and believes its engine alive, which it does of one that hangs too."""
        try:
            async with self._http.get("/health", timeout=aiohttp.ClientTimeout(total=5.0)) as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def close(self) -> None:
        await self._http.close()

    def _decoded(self, path: str, content: bytes, answer: Any) -> Any:
        try:
            return msgspec.json.decode(content, type=answer)
        except msgspec.MsgspecError as error:
            raise GeneratorError(f"{self._name}: {path} answered something else than expected: {error}") from None

    async def _request(
        self, method: str, path: str, body: dict | None, limit: float, answer: Any = dict[str, Any]
    ) -> Any:
        name = self._name
        try:
            async with self._http.request(
                method, path, json=body, timeout=aiohttp.ClientTimeout(total=limit or None)
            ) as response:
                status, content = response.status, await response.read()
        except TimeoutError:
            raise GeneratorSilentError(
                f"{name}: no answer to {path} within {limit:g} s; see its log, or raise generator.request_timeout_s",
                silent_s=limit,
            ) from None
        except aiohttp.ClientError as error:
            raise GeneratorGoneError(f"{name}: {path} failed, the server is gone ({type(error).__name__})") from None
        if status == 200:
            return self._decoded(path, content, answer) if content else {}
        if status >= 500 and not await self.has_engine():  # a server outlives its engine by a moment
            raise GeneratorGoneError(f"{name}: {path} failed, its engine died; see its log")
        detail = " ".join(content.decode(errors="replace").split())[:300]
        raise GeneratorError(f"{name}: {path} answered {status}: {detail}")
