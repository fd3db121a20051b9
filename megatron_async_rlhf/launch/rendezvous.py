"""How the machines of a run find each other: a file beside the run directory, and what they say once they have.

    first machine (`fleet`)                          every other machine (`agent`)
    listens, writes the file ───────────────────────> reads it
                             <─────────── Join ─────
                              ─────── Welcome ─────>
    all are there: plan       ─────── Start ───────>  starts the process
                             <── Started, Exited ───
                              ────── Signal, Leave ─>

Both say `Alive` every second; who hears nothing for `launch.node_timeout_s` takes the other for lost. The file holds a
secret that every message carries, and only its owner can read it: a `Start` runs whatever command it names.
"""

import hashlib
import time
from pathlib import Path

import msgspec
from msgspec import Struct

from megatron_async_rlhf import __version__
from megatron_async_rlhf.config.beats import NODE_BEAT_S
from megatron_async_rlhf.config.load import dump_config
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.launch.nodes import Node
from megatron_async_rlhf.launch.plan import ProcessSpec
from megatron_async_rlhf.run_secret import write_private

BEAT_S = NODE_BEAT_S


class Rendezvous(Struct, frozen=True, kw_only=True):
    """What the file says.

    Attributes:
        addresses: of the first machine; the likeliest first.
        key: that connections are encrypted for, and that the first machine tells nobody else.
        expires: Unix time after which nobody is let in.
    """

    host: str
    addresses: list[str]
    port: int
    key: str
    token: str
    expires: float


class Join(Struct, frozen=True, kw_only=True, tag=True):
    """
    Attributes:
        rank: of the machine; the first one is 0.
        session: of this start of the agent.
        fingerprint: of its configuration and version.
        reached_at: the address of the first machine that worked.
    """

    rank: int
    session: str
    fingerprint: str
    reached_at: str
    node: Node


class Welcome(Struct, frozen=True, tag=True):
    pass


class Refused(Struct, frozen=True, tag=True):
    reason: str


class Start(Struct, frozen=True, kw_only=True, tag=True):
    """`id` counts starts, because a generator may be started more than once."""

    id: int
    spec: ProcessSpec
    log_dir: str


class Started(Struct, frozen=True, kw_only=True, tag=True):
    id: int
    pid: int


class Exited(Struct, frozen=True, kw_only=True, tag=True):
    id: int
    returncode: int


class Signal(Struct, frozen=True, kw_only=True, tag=True):
    id: int
    number: int
    group: bool


class AskForStacks(Struct, frozen=True, tag=True):
    id: int


class ToldStacks(Struct, frozen=True, tag=True):
    """Its log has grown since it was asked."""

    id: int


class Alive(Struct, frozen=True, tag=True):
    pass


class Leave(Struct, frozen=True, kw_only=True, tag=True):
    """End every process at once, then exit with `code`."""

    code: int
    reason: str


class Left(Struct, frozen=True, tag=True):
    """An agent that goes of its own accord."""

    reason: str


ToAgent = Welcome | Refused | Start | Signal | AskForStacks | Alive | Leave
FromAgent = Join | Started | Exited | ToldStacks | Alive | Left
_to_agent = msgspec.msgpack.Decoder(ToAgent)
_from_agent = msgspec.msgpack.Decoder(FromAgent)
encode = msgspec.msgpack.encode


def decode_for_agent(raw: bytes) -> ToAgent:
    return _to_agent.decode(raw)


def decode_from_agent(raw: bytes) -> FromAgent:
    return _from_agent.decode(raw)


def fingerprint(config: RunConfig) -> str:
    """Equal on machines that run the same configuration with the same version of this package."""
    return hashlib.blake2b(f"{__version__}\n{dump_config(config)}".encode(), digest_size=8).hexdigest()


def rendezvous_path(config: RunConfig) -> Path:
    """Beside the run directory, which does not exist yet."""
    run_dir = config.run.path.absolute()
    return run_dir.with_name(f".{run_dir.name}.rendezvous")


def write_rendezvous(path: Path, rendezvous: Rendezvous) -> None:
    """In one step, readable by its owner alone.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_private(path, msgspec.json.encode(rendezvous))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror or error}); set another run.dir") from None


def read_rendezvous(path: Path) -> Rendezvous | None:
    """Nothing if it is not there, or too old to join by."""
    try:
        rendezvous = msgspec.json.decode(path.read_bytes(), type=Rendezvous)
    except (OSError, msgspec.MsgspecError):
        return None
    return rendezvous if rendezvous.expires > time.time() else None
