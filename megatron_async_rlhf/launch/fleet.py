"""The machines of a run as its supervisor sees them: lets the others join, and starts processes on any of them.

A thread of its own talks to the others, so that they hear from this machine whatever else it is busy with.
"""

import contextlib
import functools
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import zmq

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.launch.abilities import count_gpus
from megatron_async_rlhf.launch.nodes import Node, addresses, node_name, this_node
from megatron_async_rlhf.launch.plan import ProcessSpec
from megatron_async_rlhf.launch.process import LocalProcess, Process
from megatron_async_rlhf.launch.rendezvous import (
    BEAT_S,
    Alive,
    AskForStacks,
    Exited,
    Join,
    Leave,
    Left,
    Refused,
    Rendezvous,
    Signal,
    Start,
    Started,
    ToAgent,
    ToldStacks,
    Welcome,
    decode_from_agent,
    encode,
    fingerprint,
    rendezvous_path,
    write_rendezvous,
)
from megatron_async_rlhf.run_secret import MAX_MESSAGE_BYTES

_POLL_S = 0.05
_PROBE_S = 5.0


class LostMachine(msgspec.Struct, frozen=True):
    """
    Attributes:
        why: with its name.
        is_silent: it said nothing of it, as one that is down or whose network is. Without it the job may go well.
    """

    why: str
    is_silent: bool


class Fleet:
    """The machines of a run, this one first.

    Attributes:
        exit_code: that the commands on the others end with, when this one has nothing more for them to do.
    """

    def __init__(self, look: Callable[[], list[Node]], switchboard: "Switchboard | None" = None) -> None:
        self.exit_code = 0
        self._look = look
        self._switchboard = switchboard

    @functools.cached_property
    def nodes(self) -> list[Node]:
        """Looked at when they are first asked for: to count GPUs takes longer than to check a configuration.

        Raises:
            ConfigError: this machine cannot run the configuration.
        """
        return self._look()

    def machine_name(self, node: int) -> str:
        return self.nodes[node].name if node else node_name()

    def start(self, spec: ProcessSpec, log_dir: Path, *, pipe_stdout: bool = False) -> Process:
        """On the machine that `spec` names; `pipe_stdout` only on this one."""
        if spec.node == 0:
            return LocalProcess(spec, log_dir, pipe_stdout=pipe_stdout)
        assert self._switchboard is not None  # without it there is one machine
        return RemoteProcess(spec, log_dir, self._switchboard)

    def lost(self) -> LostMachine | None:
        """None if all are there."""
        return self._switchboard.lost() if self._switchboard else None


class RemoteProcess(Process):
    """On another machine, whose agent is its parent."""

    def __init__(self, spec: ProcessSpec, log_dir: Path, switchboard: "Switchboard") -> None:
        super().__init__(spec, log_dir)
        self._switchboard = switchboard
        self._id = switchboard.start(spec, log_dir)

    @property
    def pid(self) -> int | None:
        return self._switchboard.pids.get(self._id)

    @property
    def returncode(self) -> int | None:
        return self._switchboard.returncodes.get(self._id)

    def signal(self, number: int) -> None:
        self._send(number, group=False)

    def ask_for_stacks(self) -> None:
        self._switchboard.told_stacks.discard(self._id)
        self._switchboard.send(self.spec.node, AskForStacks(self._id))

    @property
    def has_told_stacks(self) -> bool:
        return self._id in self._switchboard.told_stacks

    def kill_group(self, number: int) -> None:
        self._send(number, group=True)

    def _send(self, number: int, *, group: bool) -> None:
        self._switchboard.send(self.spec.node, Signal(id=self._id, number=int(number), group=group))


@contextlib.contextmanager
def gather(config: RunConfig) -> Iterator[Fleet]:
    """All machines of the run, told to leave at the end.

    Raises:
        ConfigError: they are not there in time, cannot reach each other, or one cannot run the configuration.
    """
    if config.launch.nodes == 1:
        yield Fleet(lambda: [this_node(config, count_gpus(config))])
        return
    path = rendezvous_path(config)
    switchboard = Switchboard(config)
    try:
        write_rendezvous(path, switchboard.rendezvous(addresses(config.launch.interface)))
        switchboard.start_thread()
        gpus = count_gpus(config)  # the others do the same now
        joins = switchboard.wait_for_all(path)
        nodes = [this_node(config, gpus, _one_address(joins)), *(join.node for join in joins)]
        for node in nodes[1:]:
            _check_reachable(node)
        fleet = Fleet(lambda: nodes, switchboard)
        yield fleet
        switchboard.leave(fleet.exit_code)
    except BaseException:
        switchboard.leave(1)
        raise
    finally:
        with contextlib.suppress(OSError):  # it expires
            path.unlink()
        switchboard.close()


def _one_address(joins: list[Join]) -> str:
    reached = {join.reached_at: join.node.name for join in joins}
    if len(reached) > 1:
        by = ", ".join(f"{name} at {address}" for address, name in reached.items())
        raise ConfigError(f"the machines reach {node_name()} in different ways ({by}); name one as launch.interface")
    return next(iter(reached))


def _check_reachable(node: Node) -> None:
    """The agent listens on one of its ports until it is told to start something."""
    try:
        socket.create_connection((node.address, node.ports[0]), timeout=_PROBE_S).close()
    except OSError as error:
        raise ConfigError(
            f"{node_name()} cannot reach {node.name} at {node.address}:{node.ports[0]} ({error}): open the ports from "
            "10000 up between the machines, or name another network as launch.interface"
        ) from None


class _Member:
    """An agent that has joined.

    Attributes:
        confirmed: it has said something since. Over a slow network an answer may come too late for an agent, which tries
            again then, from another port.
    """

    def __init__(self, identity: bytes, join: Join) -> None:
        self.identity, self.join = identity, join
        self.confirmed = False
        self.heard = time.monotonic()
        self.left: str | None = None

    def gone(self, limit_s: float) -> LostMachine | None:
        """None if it is there."""
        name = f"node {self.join.rank} ({self.join.node.name})"
        if self.left is not None:
            return LostMachine(f"{name} has left: {self.left}", is_silent=False)
        if time.monotonic() - self.heard > limit_s:
            why = f"{name} is silent for more than launch.node_timeout_s = {limit_s:g}: it is down, or its network is"
            return LostMachine(why, is_silent=True)
        return None


class Switchboard:
    """The first machine's end of all connections."""

    def __init__(self, config: RunConfig) -> None:
        self.pids: dict[int, int] = {}
        self.returncodes: dict[int, int] = {}
        self.told_stacks: set[int] = set()
        self._config = config
        self._fingerprint = fingerprint(config)
        self._token = secrets.token_hex(16)
        self._members: dict[int, _Member] = {}
        self._outgoing: queue.SimpleQueue[tuple[int, ToAgent]] = queue.SimpleQueue()
        self._mismatch: str | None = None
        self._starts = 0
        self._full = self._closing = False
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._key, private = zmq.curve_keypair()
        self._socket.curve_server = True
        self._socket.curve_publickey, self._socket.curve_secretkey = self._key, private
        self._socket.maxmsgsize = MAX_MESSAGE_BYTES
        try:
            if config.launch.port:
                self._socket.bind(f"tcp://*:{config.launch.port}")
                self._port = config.launch.port
            else:
                self._port = self._socket.bind_to_random_port("tcp://*", min_port=10000, max_port=32000)
        except zmq.ZMQError as error:
            self._socket.close()
            raise ConfigError(f"launch.port = {config.launch.port} cannot be listened on ({error})") from None

    def rendezvous(self, own: list[str]) -> Rendezvous:
        expires = time.time() + self._config.launch.join_timeout_s
        return Rendezvous(
            host=node_name(),
            addresses=own,
            port=self._port,
            key=self._key.decode(),
            token=self._token,
            expires=expires,
        )

    def start_thread(self) -> None:
        self._thread.start()

    def wait_for_all(self, path: Path) -> list[Join]:
        """The others, in order of rank. Who has gone meanwhile is waited for again."""
        limits = self._config.launch
        deadline = time.monotonic() + limits.join_timeout_s
        while (missing := self._missing()) and self._mismatch is None:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"launch.nodes = {limits.nodes}: no machine came as node rank {', '.join(map(str, missing))} within "
                    f"launch.join_timeout_s = {limits.join_timeout_s:g}; start the same command on every machine, "
                    f"and keep run.dir where all of them see it ({path.parent})"
                )
            time.sleep(_POLL_S)
        if self._mismatch is not None:
            raise ConfigError(self._mismatch)
        self._full = True
        return [self._members[rank].join for rank in sorted(self._members)]

    def _missing(self) -> list[int]:
        limit, members = self._config.launch.node_timeout_s, dict(self._members)
        here = {rank for rank, member in members.items() if member.confirmed and member.gone(limit) is None}
        return [rank for rank in range(1, self._config.launch.nodes) if rank not in here]

    def start(self, spec: ProcessSpec, log_dir: Path) -> int:
        self._starts += 1
        self.send(spec.node, Start(id=self._starts, spec=spec, log_dir=str(log_dir)))
        return self._starts

    def send(self, rank: int, message: ToAgent) -> None:
        self._outgoing.put((rank, message))

    def lost(self) -> LostMachine | None:
        lost = (member.gone(self._config.launch.node_timeout_s) for member in self._members.values())
        return next((machine for machine in lost if machine is not None), None)

    def leave(self, code: int) -> None:
        reason = f"the first machine, {node_name()}, has ended; see what it says" if code else ""
        for rank in list(self._members):
            self.send(rank, Leave(code=code, reason=reason))

    def close(self) -> None:
        """After everything was sent."""
        self._closing = True
        if self._thread.is_alive():
            self._thread.join()
        self._socket.close(linger=2000)
        self._context.term()

    def _serve(self) -> None:
        beat = 0.0
        while True:
            closing = self._closing  # read before the queue is emptied: what was put before it is sent
            if self._socket.poll(int(_POLL_S * 1000)):
                self._receive()
            if time.monotonic() - beat > BEAT_S:
                beat = time.monotonic()
                for rank in list(self._members):
                    self.send(rank, Alive())
            while not self._outgoing.empty():
                rank, message = self._outgoing.get()
                self._answer(self._members[rank].identity, message)
            if closing:
                return

    def _receive(self) -> None:
        identity, *frames = self._socket.recv_multipart()
        if len(frames) != 2 or not secrets.compare_digest(frames[0], self._token.encode()):
            self._answer(identity, Refused("the secret is of an earlier start"))
            return
        try:
            message = decode_from_agent(frames[1])
        except msgspec.MsgspecError:
            self._answer(identity, Refused("it speaks another version of this program"))
            return
        if isinstance(message, Join):
            self._joining(identity, message)
            return
        member = next((m for m in self._members.values() if m.identity == identity), None)
        if member is None:
            return
        member.heard, member.confirmed = time.monotonic(), True
        if isinstance(message, Started):
            self.pids[message.id] = message.pid
        elif isinstance(message, Exited):
            self.returncodes[message.id] = message.returncode
        elif isinstance(message, ToldStacks):
            self.told_stacks.add(message.id)
        elif isinstance(message, Left):
            member.left = message.reason

    def _joining(self, identity: bytes, join: Join) -> None:
        known, limit = self._members.get(join.rank), self._config.launch.node_timeout_s
        if not 0 < join.rank < self._config.launch.nodes:
            reason = (
                f"its node rank {join.rank} is not between 1 and launch.nodes - 1 = {self._config.launch.nodes - 1}"
            )
        elif join.fingerprint != self._fingerprint:
            reason = "its configuration or version is not the first machine's; start the same command on every machine"
            self._mismatch = f"node {join.rank} ({join.node.name}) is refused: {reason}"
        elif known is not None and known.join.session != join.session and (self._full or known.gone(limit) is None):
            reason = f"node rank {join.rank} is taken by {known.join.node.name}"
            if not self._full:
                reason += f"; if it was ended there, start it again after launch.node_timeout_s = {limit:g} seconds"
        else:
            self._members[join.rank] = _Member(identity, join)
            self._answer(identity, Welcome())
            return
        self._answer(identity, Refused(reason))

    def _answer(self, identity: bytes, message: ToAgent) -> None:
        self._socket.send_multipart([identity, encode(message)])
