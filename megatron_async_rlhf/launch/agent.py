"""Every machine of a run but the first: joins, starts the processes it is told to, and ends them when it must.

    find the rendezvous file ─> join ─> serve ──┬─ told to leave ──────────────────────> end all, exit as told
                                                └─ nothing heard for node_timeout_s ──> end all, exit 1

SIGTERM and Ctrl-C do not end it at once: a scheduler sends them to every process of a job, and it is the first machine
that decides what becomes of the run. A second one does. SIGHUP, of a terminal that is gone, it passes by.
"""

import secrets
import signal
import socket
import threading
import time
from pathlib import Path

import typer
import zmq

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.launch.abilities import count_gpus
from megatron_async_rlhf.launch.nodes import Node, addresses, node_name, this_node
from megatron_async_rlhf.launch.process import LocalProcess
from megatron_async_rlhf.launch.rendezvous import (
    BEAT_S,
    Alive,
    AskForStacks,
    Exited,
    FromAgent,
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
    decode_for_agent,
    encode,
    fingerprint,
    read_rendezvous,
    rendezvous_path,
)
from megatron_async_rlhf.launch.scratch import remove_abandoned
from megatron_async_rlhf.launch.terminal import handling_interrupts
from megatron_async_rlhf.run_secret import MAX_MESSAGE_BYTES

_POLL_S = 0.1
_ANSWER_S = 5.0  # an address that does not answer within it is not the one


class Link:
    """A connection to the first machine at one of its addresses."""

    def __init__(self, rendezvous: Rendezvous, address: str) -> None:
        self._token = rendezvous.token.encode()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 1000
        self._socket.maxmsgsize = MAX_MESSAGE_BYTES
        self._socket.curve_serverkey = rendezvous.key.encode()
        self._socket.curve_publickey, self._socket.curve_secretkey = zmq.curve_keypair()
        self._socket.connect(f"tcp://{address}:{rendezvous.port}")

    def send(self, message: FromAgent) -> None:
        self._socket.send_multipart([self._token, encode(message)])

    def receive(self, timeout_s: float) -> ToAgent | None:
        """Nothing if nothing comes."""
        return decode_for_agent(self._socket.recv()) if self._socket.poll(int(timeout_s * 1000)) else None

    def close(self) -> None:
        self._socket.close()
        self._context.term()


class Agent:
    """This machine, which has joined."""

    def __init__(self, config: RunConfig, link: Link, listening: socket.socket) -> None:
        self._config = config
        self._link = link
        self._listening = listening
        self._processes: dict[int, LocalProcess] = {}
        self._exited: set[int] = set()
        self._asked: set[int] = set()  # for their stacks, which they have not told yet
        self._signals = 0

    def serve(self) -> int:
        """Until told to leave; returns the exit code."""
        remove_abandoned()
        with handling_interrupts(self._on_signal):
            try:
                return self._serve()
            finally:
                self._end_all()
                self._listening.close()

    def _serve(self) -> int:
        heard = beat = time.monotonic()
        self._link.send(Alive())  # the answer has come
        limit = self._config.launch.node_timeout_s
        while True:
            message = self._link.receive(_POLL_S)
            now = time.monotonic()
            if message is not None:
                heard = now
                if isinstance(message, Leave):
                    if message.reason:
                        typer.echo(f"{node_name()}: {message.reason}", err=True)
                    return message.code
                self._obey(message)
            elif now - heard > limit:
                typer.echo(
                    f"error: {node_name()}: the first machine is silent for more than launch.node_timeout_s = {limit:g}; "
                    "everything here is ended",
                    err=True,
                )
                return 1
            if self._signals > 1:
                self._link.send(Left("it was interrupted"))
                return 130
            self._report_exits()
            self._report_stacks()
            if now - beat > BEAT_S:
                beat = now
                self._link.send(Alive())

    def _obey(self, message: ToAgent) -> None:
        if isinstance(message, Start):
            self._listening.close()  # its port may be one that the process is to use
            self._start(message)
        elif isinstance(message, AskForStacks):
            self._asked.add(message.id)
            self._processes[message.id].ask_for_stacks()
        elif isinstance(message, Signal):
            process = self._processes[message.id]
            process.kill_group(message.number) if message.group else process.signal(message.number)
            if message.group and message.number == signal.SIGKILL:  # while the first machine continues hearing from us
                threading.Thread(target=process.clean_up).start()

    def _start(self, message: Start) -> None:
        try:
            process = LocalProcess(message.spec, Path(message.log_dir))
        except OSError as error:
            reason = f"{message.spec.name} cannot be started ({error}); is run.dir where all machines see it?"
            self._link.send(Left(reason))
            raise ConfigError(f"{node_name()}: {reason}") from None
        self._processes[message.id] = process
        self._link.send(Started(id=message.id, pid=process.pid))

    def _report_exits(self) -> None:
        for id, process in self._processes.items():
            if id not in self._exited and (code := process.returncode) is not None:
                self._exited.add(id)
                self._link.send(Exited(id=id, returncode=code))

    def _report_stacks(self) -> None:
        for id in [id for id in self._asked if self._processes[id].has_told_stacks]:
            self._asked.discard(id)
            self._link.send(ToldStacks(id))

    def _end_all(self) -> None:
        """At once: the first machine has asked them politely, or is gone."""
        for process in self._processes.values():
            process.kill_group(signal.SIGKILL)
        for process in self._processes.values():
            process.clean_up()

    def _on_signal(self, number: int, frame: object) -> None:
        self._signals += 1
        if self._signals == 1:
            typer.echo(f"{node_name()}: interrupted; the first machine decides (again to leave at once)", err=True)


def serve(config: RunConfig, rank: int) -> int:
    """Be machine `rank` of the run until it is over; returns the exit code.

    Raises:
        ConfigError: the first machine is not found or not reached in time, refuses, or this one cannot run the
            configuration.
    """
    gpus = count_gpus(config)
    session, path = secrets.token_hex(8), rendezvous_path(config)
    deadline = time.monotonic() + config.launch.join_timeout_s
    found: Rendezvous | None = None
    while time.monotonic() < deadline:
        rendezvous, refused = read_rendezvous(path), ""
        if rendezvous is None:
            time.sleep(_POLL_S)
            continue
        found = rendezvous
        for address in rendezvous.addresses:
            node = this_node(config, gpus, _own_address(config, address, rendezvous.port))
            link, listening = Link(rendezvous, address), _listen(node)
            join = Join(rank=rank, session=session, fingerprint=fingerprint(config), reached_at=address, node=node)
            link.send(join)
            answer = link.receive(_ANSWER_S)
            if isinstance(answer, Welcome):
                try:
                    return Agent(config, link, listening).serve()
                finally:
                    link.close()
            link.close()
            listening.close()
            if isinstance(answer, Refused):
                refused = answer.reason
                break
        if refused and read_rendezvous(path) in (found, None):  # else there is a new one to try
            raise ConfigError(f"{node_name()} is refused by the first machine, {found.host}: {refused}")
        time.sleep(_POLL_S)
    raise ConfigError(_not_joined(config, path, found))


def _own_address(config: RunConfig, address: str, port: int) -> str:
    """The address of this machine that faces the first one."""
    if config.launch.interface is not None:
        return addresses(config.launch.interface)[0]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, port))
        except OSError:  # no route: joining will say so
            return "127.0.0.1"
        return probe.getsockname()[0]


def _listen(node: Node) -> socket.socket:
    """On a port that the first machine tries, to see whether it reaches this one."""
    return socket.create_server((node.address, node.ports[0]))


def _not_joined(config: RunConfig, path: Path, found: Rendezvous | None) -> str:
    limit = f"within launch.join_timeout_s = {config.launch.join_timeout_s:g}"
    if found is None and not path.exists():
        return (
            f"{node_name()}: no {path} {limit}; start the same command on the first machine (node rank 0), and keep "
            "run.dir where all machines see it"
        )
    if found is None:
        return (
            f"{node_name()}: {path} is of an earlier start and has expired (or this machine's clock is ahead of the first one's); "
            "start the first machine (node rank 0) again"
        )
    tried = ", ".join(f"{address}:{found.port}" for address in found.addresses)
    return (
        f"{node_name()} cannot reach the first machine, {found.host}, at any of {tried} {limit}: open the ports from 10000 "
        "up between the machines (or set launch.port to an open one), or name another network as launch.interface"
    )
