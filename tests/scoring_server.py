"""A stand-in for vLLM's pooling server: answers `/classify` as it does, counts what it is asked, and fails as it is told."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from aiohttp import web

# vLLM's own words when a score is NaN, which JSON has no word for.
NOT_FINITE = {"error": {"message": "Out of range float values are not JSON compliant: nan", "code": 400}}

PROBE = [[0]]


def score_of(token_ids: Sequence[int]) -> float:
    """What the stand-in's model makes of a sequence."""
    return sum((place + 1) * token for place, token in enumerate(token_ids)) % 1009 / 100


class ScoringServer:
    """On a port of its own, which it keeps when it is started again.

    Attributes:
        behaviour: `answers`; `slow`: one request after the other takes `delay_s`, but for probes; `hangs`: its HTTP front
            takes requests that nobody answers; `nan`, `null`, `missing`, `labels`, `garbage`: what it answers is no score;
            `broken`: it says so with a status of 500.
        scored: how often it was given each sequence and answered.
        largest: sequences of the largest request.
    """

    def __init__(self) -> None:
        self.behaviour, self.delay_s = "answers", 0.0
        self.scored: Counter[tuple[int, ...]] = Counter()
        self.bodies: list[dict] = []
        self.asked = asyncio.Event()
        self.port = 0
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        self._engine = asyncio.Lock()
        application = web.Application()
        application.router.add_post("/classify", self._classify)
        application.router.add_get("/health", self._health)
        self._runner = web.AppRunner(application, shutdown_timeout=0.05)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True).start()
        self.port = self._runner.addresses[0][1]

    async def die(self) -> None:
        """Requests under way are cut off, further ones refused."""
        if self._runner is not None:
            for connection in list(self._runner.server.connections):
                if connection.transport is not None:
                    connection.transport.abort()
            await self._runner.cleanup()
            self._runner = None

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _classify(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.bodies.append(body)
        self.asked.set()
        if self.behaviour == "slow":
            if body["input"] != PROBE:
                async with self._engine:
                    await asyncio.sleep(self.delay_s)
        else:
            await asyncio.sleep(self.delay_s)
        if self.behaviour == "hangs":
            await asyncio.sleep(3600)
        if self.behaviour == "broken":
            return web.json_response({"error": "the engine could not do it"}, status=500)
        if self.behaviour == "nan":
            return web.json_response(NOT_FINITE, status=400)
        self.scored.update(tuple(ids) for ids in body["input"])
        items = [{"index": i, "probs": [score_of(ids)], "label": "LABEL_0"} for i, ids in enumerate(body["input"])]
        match self.behaviour:
            case "null":
                items[0]["probs"] = [None]
            case "missing":
                items.pop()
            case "labels":
                items[0]["probs"] = [0.1, 0.9]
            case "garbage":
                return web.Response(text=json.dumps({"data": [{"index": 0, "probs": [float("nan")]}]}))
        return web.json_response({"data": items})


@asynccontextmanager
async def serving(count: int) -> AsyncIterator[list[ScoringServer]]:
    servers = [ScoringServer() for _ in range(count)]
    try:
        for server in servers:
            await server.start()
        yield servers
    finally:
        for server in servers:
            await server.die()
