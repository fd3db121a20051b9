"""Who does not know a run's secret is not answered."""

import asyncio
import contextlib
import os
import random
import socket
import stat
from pathlib import Path

import pytest
import zmq
from stranger import zmtp_message

from megatron_async_rlhf import run_secret
from megatron_async_rlhf.errors import RunError
from megatron_async_rlhf.run_secret import as_client, as_server, may_ask, request_headers, secret_path, write_secret
from megatron_async_rlhf.serving.guard import Guard

WAIT_MS = 1000
STRANGERS = 10_000 if os.environ.get("ASYNC_RLHF_TEST_THOROUGH") == "1" else 1000


@pytest.fixture
def belongs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes this process one of a run, or of none."""

    def belongs(name: str | None) -> None:
        if name is None:
            monkeypatch.delenv(run_secret.VARIABLE, raising=False)
            return
        directory = tmp_path / name
        if not directory.exists():
            directory.mkdir()
            write_secret(directory)
        monkeypatch.setenv(run_secret.VARIABLE, str(secret_path(directory)))

    return belongs


def test_the_file_is_its_owners_alone_and_new_each_time(tmp_path: Path):
    secrets = set()
    for _ in range(3):
        write_secret(tmp_path)
        assert stat.S_IMODE(os.stat(secret_path(tmp_path)).st_mode) == 0o600
        secrets.add(secret_path(tmp_path).read_text())
    assert len(secrets) == 3 and all(len(secret) == 64 for secret in secrets)
    assert [path.name for path in tmp_path.iterdir()] == [".secret"]


def test_a_process_without_a_run_neither_asks_nor_shows(belongs):
    belongs(None)
    assert request_headers() == {} and may_ask(None) and may_ask(b"Bearer x")


def test_a_secret_that_is_gone_is_an_error(belongs, tmp_path: Path):
    belongs("run")
    secret_path(tmp_path / "run").unlink()
    with pytest.raises(RunError, match="the run's secret cannot be read"):
        request_headers()


def asked(path: str, headers: dict[str, str], kind: str = "http") -> list[dict]:
    """What a server behind the guard answers."""
    sent: list[dict] = []

    async def served(scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message) -> None:
        sent.append(message)

    scope = {"type": kind, "path": path, "headers": [(k.lower().encode(), v.encode()) for k, v in headers.items()]}
    asyncio.run(Guard(served)(scope, None, send))
    return sent


@pytest.mark.parametrize("path", ["/health", "/v1/completions", "/collective_rpc", "/async_rlhf/sample", "/metrics"])
def test_a_server_answers_its_run_alone(belongs, path: str):
    belongs("other")
    others = request_headers()
    belongs("run")
    own = request_headers()
    assert asked(path, own)[0]["status"] == 200
    for headers in (
        {},
        others,
        {"Authorization": own["Authorization"][:-1]},
        {"Authorization": own["Authorization"][7:]},
    ):
        assert asked(path, headers)[0]["status"] == 401
    assert asked(path, {}, "websocket") == [{"type": "websocket.close", "code": 1008}]


def answer_of(server: zmq.Socket, client: zmq.Socket, port: int) -> bytes | None:
    """What the client hears, if it is heard."""
    client.connect(f"tcp://127.0.0.1:{port}")
    client.send(b"command")
    if not server.poll(WAIT_MS):
        return None
    server.send(b"answer to " + server.recv())
    return client.recv() if client.poll(WAIT_MS) else None


@pytest.mark.parametrize("kinds", [(zmq.PAIR, zmq.PAIR), (zmq.REP, zmq.REQ)])
def test_a_socket_hears_its_run_alone(belongs, kinds: tuple[int, int]):
    context = zmq.Context()
    context.linger = 0
    belongs("run")
    server = context.socket(kinds[0])
    as_server(server)
    port = server.bind_to_random_port("tcp://127.0.0.1")
    for name in ("other", None):  # who is not let in does not take the place of who is
        belongs(name)
        stranger = context.socket(kinds[1])
        as_client(stranger)
        assert answer_of(server, stranger, port) is None
    belongs("run")
    client = context.socket(kinds[1])
    as_client(client)
    assert answer_of(server, client, port) == b"answer to command"
    context.destroy()


@pytest.mark.parametrize("kind", [zmq.PAIR, zmq.REP])
def test_garbage_does_no_harm(belongs, kind: int):
    """Random bytes, cut-off handshakes, other mechanisms, enormous frames; then whoever knows the secret is heard."""
    belongs("run")
    context = zmq.Context()
    context.linger = 0
    server = context.socket(kind)
    as_server(server)
    port = server.bind_to_random_port("tcp://127.0.0.1")
    dice = random.Random(0)
    for number in range(STRANGERS):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as stranger:
            stranger.sendall(zmtp_message(dice))
            if number % 50 == 0:
                stranger.settimeout(0.05)
                stranger.recv(1000)
    assert not server.poll(200), "nothing of it is a message"
    client = context.socket(zmq.PAIR if kind == zmq.PAIR else zmq.REQ)
    as_client(client)
    assert answer_of(server, client, port) == b"answer to command"
    context.destroy()
