"""A Hugging Face hub on this machine: a few repositories, one gated, one that refuses what is asked too often."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

SHA = "0123456789abcdef0123456789abcdef01234567"
Files = dict[str, bytes]


class FakeHub:
    """What it serves, and what it was asked for.

    Attributes:
        repositories: files by `models/org/name` or `datasets/org/name`.
        gated: repositories of which everybody may see that they are there, and nobody the files.
        served: files that were asked for with GET, as `org/name/file`.
    """

    def __init__(self, repositories: dict[str, Files], gated: set[str]) -> None:
        self.repositories, self.gated = repositories, gated
        self.served: list[str] = []
        self.url = ""


@contextmanager
def serve(hub: FakeHub) -> Iterator[FakeHub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None: ...

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            status, headers, content = _response(hub, unquote(urlsplit(self.path).path).strip("/").split("/"), body)
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

    return Handler


def _response(hub: FakeHub, parts: list[str], body: bool) -> tuple[int, dict[str, str], bytes]:
    """Of `api/models/ORG/NAME[/revision/REV | /tree/REV | /paths-info/REV]` and `[datasets/]ORG/NAME/resolve/REV/FILE`."""
    if parts[0] == "api":
        kind, name, rest = parts[1], "/".join(parts[2:4]), parts[4:]
    else:
        kind, offset = ("datasets", 1) if parts[0] == "datasets" else ("models", 0)
        name, rest = "/".join(parts[offset : offset + 2]), parts[offset + 2 :]
    files = hub.repositories.get(f"{kind}/{name}")
    if files is None:
        return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
    action, revision, path = (
        (rest[0] if rest else "revision"),
        (rest[1] if len(rest) > 1 else "main"),
        "/".join(rest[2:]),
    )
    if revision not in ("main", "v1", SHA):
        return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
    if action == "resolve":
        if name in hub.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b"{}"
        if path not in files:
            return 404, {"X-Error-Code": "EntryNotFound"}, b"{}"
        if body:
            hub.served.append(f"{name}/{path}")
        etag = hashlib.sha1(files[path]).hexdigest()
        return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": SHA}, files[path]
    entries = [
        {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        for file, content in files.items()
    ]
    if action in ("tree", "paths-info"):
        below = [entry for entry in entries if str(entry["path"]).startswith(path)]
        return 200, {"Content-Type": "application/json"}, json.dumps(below).encode()
    about = {
        "id": name, "sha": SHA, "private": False, "gated": "manual" if name in hub.gated else False, "tags": [],
        "siblings": [{"rfilename": file} for file in files],
    }  # fmt: skip
    return 200, {"Content-Type": "application/json"}, json.dumps(about).encode()
