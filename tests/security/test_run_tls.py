"""Requests between machines are encrypted, and only the run's own servers are believed, and shown its secret."""

import asyncio
import ssl
import stat
from pathlib import Path

import pytest
from aiohttp import web

from megatron_async_rlhf import run_secret
from megatron_async_rlhf.errors import GeneratorGoneError, RunError
from megatron_async_rlhf.run_secret import secret_path, write_secret
from megatron_async_rlhf.run_tls import client_tls, tls_files, write_certificate
from megatron_async_rlhf.serving.connection import Connection


@pytest.fixture
def run_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes this process one of a run; its directory."""

    def run_of(name: str) -> Path:
        directory = tmp_path / name
        if not directory.exists():
            directory.mkdir()
            write_secret(directory)
            write_certificate(directory)
        monkeypatch.setenv(run_secret.VARIABLE, str(secret_path(directory)))
        return directory

    return run_of


def ask(directory: Path | None, **how: bool) -> list[str | None]:
    """A request to a server with the certificate of a run, or without one: what it was shown."""
    shown: list[str | None] = []

    async def answer(request: web.Request) -> web.Response:
        shown.append(request.headers.get("Authorization"))
        return web.json_response({})

    async def go() -> None:
        context = None
        if directory is not None:
            key, certificate = tls_files(directory)
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate, key)
        app = web.Application()
        app.router.add_get("/", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
        await site.start()
        port = runner.addresses[0][1]
        client = Connection("generator.0", f"http{'s' if context else ''}://127.0.0.1:{port}", 10.0, **how)
        try:
            await client.get("/")
        finally:
            await client.close()
            await runner.cleanup()

    asyncio.run(go())
    return shown


def test_a_server_of_the_run_is_believed(run_of):
    directory = run_of("run")
    assert ask(directory) == [f"Bearer {secret_path(directory).read_text()}"]
    for path in tls_files(directory):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_server_of_another_run_is_not_and_is_shown_nothing(run_of):
    other = run_of("other")
    run_of("run")
    with pytest.raises(GeneratorGoneError, match="CertificateError"):
        ask(other)


def test_somebody_elses_server_is_not_shown_the_secret(run_of):
    directory = run_of("run")
    assert ask(None, ours=False) == [None]
    with pytest.raises(GeneratorGoneError, match="CertificateError"):  # as any other whose certificate nobody knows
        ask(directory, ours=False)


def test_a_certificate_that_is_gone_is_an_error(run_of, monkeypatch):
    directory = run_of("run")
    tls_files(directory)[1].unlink()
    with pytest.raises(RunError, match="the run's certificate cannot be read"):
        client_tls()
    monkeypatch.delenv(run_secret.VARIABLE)
    assert client_tls() is None
