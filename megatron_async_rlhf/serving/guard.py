"""Lets a vLLM server answer the processes of its run alone.

This is ASGI middleware (vLLM's option `--middleware`), which must be the last one named: that is the outermost.
"""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from megatron_async_rlhf.run_secret import VARIABLE, may_ask

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

GUARD = "megatron_async_rlhf.serving.guard.Guard"
_REFUSAL = (
    f"this server answers the processes of its run alone; set {VARIABLE} to the file .secret in the run's directory\n"
)


class Guard:
    """ASGI application around another one."""

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or may_ask(dict(scope["headers"]).get(b"authorization")):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            content = _REFUSAL.encode()
            headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(content)).encode())]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": content})
