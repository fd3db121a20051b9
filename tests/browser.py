"""A page in headless Chromium, through its DevTools protocol."""

import asyncio
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import pytest
from msgspec import json

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-quic", "--hide-scrollbars", "--remote-debugging-port=0",
)  # fmt: skip
_READY_S = 60.0
# A page with scripts of its own says so itself.
_DRAWN = """document.documentElement?.dataset.ready === 'true'
    || (document.readyState === 'complete' && document.querySelector('script') === null)"""


class Seen(NamedTuple):
    """Of a page that has drawn itself.

    Attributes:
        said: on the console, errors included.
        asked: addresses that it requested, beside its own.
        overflow: pixels that its content is wider than the window.
        seconds: until it was drawn, from its navigation on.
        results: of the expressions.
    """

    said: list[str]
    asked: list[str]
    overflow: int
    seconds: float
    results: list[Any]


def look(
    page: Path | str,
    *,
    width: int = 1440,
    height: int = 900,
    dark: bool = False,
    before: str = "",
    drawn: str = _DRAWN,
    expressions: Sequence[str] = (),
) -> Seen:
    """
    Args:
        page: a file or an address.
        drawn: JavaScript that says whether it has drawn itself.
        before: JavaScript that runs before the page's own.
        expressions: JavaScript, evaluated when it has drawn itself; promises are waited for.
    """
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        command = [CHROMIUM, *_FLAGS, f"--user-data-dir={profile}", "about:blank"]
        browser = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        try:
            url = page if isinstance(page, str) else page.resolve().as_uri()
            return asyncio.run(_look(Path(profile), url, width, height, dark, before, drawn, expressions))
        finally:
            browser.kill()
            browser.wait()


def assert_fits(page: Path) -> None:
    """Wide and narrow, light and dark: nothing on the console, nothing asked of the network, nothing beside the window."""
    for width in (1440, 390):
        for dark in (False, True):
            seen = look(page, width=width, dark=dark)
            assert (seen.said, seen.asked, seen.overflow) == ([], [], 0), (width, dark)


async def _look(
    profile: Path,
    url: str,
    width: int,
    height: int,
    dark: bool,
    before: str,
    drawn: str,
    expressions: Sequence[str],
) -> Seen:
    port = await _port(profile)
    async with aiohttp.ClientSession() as http:
        async with http.get(f"http://127.0.0.1:{port}/json/list") as answer:
            targets = await answer.json()
        target = next(one for one in targets if one["type"] == "page")
        async with http.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            tab = _Tab(socket)
            for domain in ("Page", "Runtime", "Log", "Network"):
                await tab.do(f"{domain}.enable")
            scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
            await tab.do("Emulation.setEmulatedMedia", features=[scheme])
            await tab.do(
                "Emulation.setDeviceMetricsOverride",
                width=width,
                height=height,
                deviceScaleFactor=1,
                mobile=width < 600,
            )
            await tab.do("Page.addScriptToEvaluateOnNewDocument", source=before)
            start = asyncio.get_running_loop().time()
            await tab.do("Page.navigate", url=url)
            async with asyncio.timeout(_READY_S):
                while not await tab.value(drawn):
                    await asyncio.sleep(0.02)
            await tab.value(
                "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))"
            )
            seconds = asyncio.get_running_loop().time() - start
            overflow = await tab.value("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            results = [await tab.value(expression) for expression in expressions]
            return Seen(tab.said, [one for one in tab.asked if not one.startswith("file:")], overflow, seconds, results)


async def _port(profile: Path) -> int:
    async with asyncio.timeout(_READY_S):
        while not (file := profile / "DevToolsActivePort").exists() or "\n" not in file.read_text():
            await asyncio.sleep(0.05)
    return int(file.read_text().split("\n")[0])


class _Tab:
    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._number = socket, 0
        self.said: list[str] = []
        self.asked: list[str] = []

    async def do(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        await self._socket.send_str(json.encode({"id": self._number, "method": method, "params": parameters}).decode())
        while True:
            message = json.decode(await self._socket.receive_str())
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]
            self._heard(message)

    async def value(self, expression: str) -> Any:
        result = await self.do("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def _heard(self, message: dict[str, Any]) -> None:
        about = message.get("params", {})
        match message.get("method"):
            case "Runtime.consoleAPICalled":
                self.said.append(" ".join(str(one.get("value", one.get("description"))) for one in about["args"]))
            case "Runtime.exceptionThrown":
                self.said.append(about["exceptionDetails"]["text"])
            case "Log.entryAdded":
                self.said.append(about["entry"]["text"])
            case "Network.requestWillBeSent":
                self.asked.append(about["request"]["url"])
