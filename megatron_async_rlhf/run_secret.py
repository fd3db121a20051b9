"""The secret of a run, by which its processes know each other.

Whoever starts a run writes it into the run's directory, readable by its owner alone. Every process is told the file, not
the secret, so it stands in no command line and no environment. HTTP requests carry it; ZeroMQ sockets derive the keys of
their encryption (CURVE) from it, so that a peer without it does not get as far as a message.

A process that belongs to no run, because nobody has told it a file, neither asks for a secret nor shows one.
"""

import hashlib
import os
import secrets
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_async_rlhf.errors import RunError

if TYPE_CHECKING:
    import zmq

VARIABLE = "ASYNC_RLHF_SECRET_FILE"
_NAME = ".secret"
_BYTES = 32
MAX_MESSAGE_BYTES = 2**31  # of one ZeroMQ message


def secret_path(run_dir: Path) -> Path:
    return run_dir / _NAME


def write_secret(run_dir: Path) -> None:
    """A new one. Raises OSError."""
    write_private(secret_path(run_dir), secrets.token_hex(_BYTES).encode())


def write_private(path: Path, content: bytes) -> None:
    """In one step, readable by its owner alone. Raises OSError."""
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
    partial.replace(path)


def run_secret() -> str | None:
    """Of the run that this process belongs to.

    Raises:
        RunError: the file that it was told cannot be read.
    """
    path = os.environ.get(VARIABLE)
    return None if path is None else _read(path)


@cache
def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        raise RunError(f"{VARIABLE} = {path}: the run's secret cannot be read ({error})") from None


def request_headers() -> dict[str, str]:
    """That show it to an HTTP server of the run."""
    secret = run_secret()
    return {} if secret is None else {"Authorization": f"Bearer {secret}"}


def may_ask(authorization: bytes | None) -> bool:
    """Whether a request with this header comes from a process of the run."""
    secret = run_secret()
    return secret is None or secrets.compare_digest(authorization or b"", f"Bearer {secret}".encode())


def as_server(socket: "zmq.Socket") -> None:
    """Before it is bound: lets in who knows the secret."""
    socket.maxmsgsize = MAX_MESSAGE_BYTES
    if (keys := _server_keys()) is not None:
        socket.curve_server = True
        socket.curve_publickey, socket.curve_secretkey = keys


def as_client(socket: "zmq.Socket") -> None:
    """Before it is connected."""
    import zmq

    socket.maxmsgsize = MAX_MESSAGE_BYTES
    if (keys := _server_keys()) is not None:
        socket.curve_serverkey = keys[0]
        socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()


def _server_keys() -> tuple[bytes, bytes] | None:
    """Public and secret key. The public one is never sent, so only who knows the run's secret can make it."""
    import zmq
    from zmq.utils import z85

    secret = run_secret()
    if secret is None:
        return None
    private = z85.encode(hashlib.blake2b(secret.encode(), digest_size=32, person=b"async_rlhf_curve").digest())
    return zmq.curve_public(private), private
