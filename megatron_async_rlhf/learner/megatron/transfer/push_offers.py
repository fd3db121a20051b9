"""Whether a push that was offered begins: decided once, for all learner ranks, while training continues.

controller ── BeginPush ──> a thread on rank 0 ──┐ whichever comes first
training: weights are about to change ───────────┴─> verdict ── broadcast ──> the sending thread of every rank
"""

from concurrent.futures import Future
from datetime import timedelta
from threading import Event, Lock, Thread

import torch
import torch.distributed as dist
import zmq

from megatron_async_rlhf.learner.megatron.parallel import Placement
from megatron_async_rlhf.learner.protocol import Answer, decode_begin_push, encode_answer
from megatron_async_rlhf.run_secret import as_server

_LOOK_MS = 500  # how often the listening thread looks whether it is to end


class PushOffers:
    """At most one offer at a time. Collective over the learner, except where rank 0 is told to begin.

    Attributes:
        address: on rank 0, the ZeroMQ address that takes BeginPush; empty elsewhere, and before `listen`.
    """

    def __init__(self, placement: Placement, timeout_s: float) -> None:
        self._rank = placement.rank
        # Only sending threads use it, so that it never meets a collective of the training.
        self._group = None
        if dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        self._lock = Lock()
        self._version: int | None = None  # on offer, undecided; on rank 0
        self._verdict: Future[bool] = Future()
        self._closed = Event()
        self._listener: Thread | None = None
        self.address = ""

    def listen(self, host: str) -> None:
        """From now on rank 0 takes BeginPush on `host`. Nothing happens the second time."""
        if self._rank == 0 and self._listener is None:
            self._listen(host)

    def make(self, version: int) -> None:
        """Offer to push this version."""
        if self._rank:
            return
        with self._lock:
            self._version, self._verdict = version, Future()

    def begin(self, version: int) -> bool:
        """On rank 0, in any thread: whether the push of this version begins; not if it is not on offer any more."""
        with self._lock:
            if self._version != version:
                return False
            self._version = None
            self._verdict.set_result(True)
            return True

    def withdraw(self) -> None:
        """A push that was not told to begin by now never will."""
        with self._lock:
            if self._version is not None:
                self._version = None
                self._verdict.set_result(False)

    def verdict(self) -> bool:
        """Wait for it; in the sending thread of every rank."""
        begins = torch.zeros(1, dtype=torch.uint8)
        if self._rank == 0:
            begins[0] = self._verdict.result()
        if self._group is not None:
            dist.broadcast(begins, src=0, group=self._group)
        return bool(begins)

    def close(self) -> None:
        self.withdraw()
        self._closed.set()
        if self._listener is not None:
            self._listener.join()

    def _listen(self, host: str) -> None:
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.REP)
        as_server(socket)
        self.address = f"tcp://{host}:{socket.bind_to_random_port(f'tcp://{host}')}"
        self._listener = Thread(target=self._answer_all, args=(socket,), name="push-offers", daemon=True)
        self._listener.start()

    def _answer_all(self, socket: zmq.Socket[bytes]) -> None:
        while not self._closed.is_set():
            if socket.poll(_LOOK_MS):
                command = decode_begin_push(socket.recv())
                socket.send(encode_answer(Answer(id=command.id, begun=self.begin(command.version))))
        socket.close(linger=0)
