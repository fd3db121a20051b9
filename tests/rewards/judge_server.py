"""A chat endpoint on this machine that does what a test says, and remembers what it was asked."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager

from aiohttp import web

from megatron_async_rlhf.launch.nodes import free_ports

Say = Callable[[dict, int], str | web.StreamResponse | Awaitable[str | web.StreamResponse]]


class Server:
    """
    Attributes:
        requests: all that came, in order, with the time of the event loop at `times`.
        answered: questions that a judgement was given to.
    """

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/v1"
        self.requests: list[dict] = []
        self.headers: list[dict] = []
        self.times: list[float] = []
        self.answered: list[dict] = []


@asynccontextmanager
async def serving(say: Say, port: int | None = None):
    """`say` gets a request and its number, from 1; a text it returns is the answer."""
    port = port or free_ports(1)[0]
    server = Server(port)

    async def handle(http: web.Request) -> web.StreamResponse:
        request = await http.json()
        server.requests.append(request)
        server.headers.append(dict(http.headers))
        server.times.append(asyncio.get_running_loop().time())
        said = say(request, len(server.requests))
        if not isinstance(said, str | web.StreamResponse):
            said = await said
        if isinstance(said, web.StreamResponse):
            return said
        server.answered.append(request)
        choice = {"message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
        return web.json_response({"choices": [choice], "usage": {"total_tokens": 10}})

    app = web.Application()
    app.router.add_post("/v1/chat/completions", handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, reuse_address=True).start()
    try:
        yield server
    finally:
        await runner.cleanup()


def question(request: dict) -> str:
    return request["messages"][0]["content"]


def longer_is_better(request: dict, number: int) -> str:
    """By the package's own pairwise template."""
    text = question(request)
    a = text.partition("[Answer of assistant A]\n")[2].partition("\n[End")[0]
    b = text.partition("[Answer of assistant B]\n")[2].partition("\n[End")[0]
    return "Hm. [[C]]" if len(a) == len(b) else f"[[A]] or so? No: [[{'A' if len(a) > len(b) else 'B'}]]"
