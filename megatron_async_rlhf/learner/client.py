"""The controller's end of the learner's command channel (ZeroMQ). No torch."""

import asyncio

import msgspec
import zmq
import zmq.asyncio

from megatron_async_rlhf.errors import (
    LearnerError,
    LearnerSilentError,
    NonFiniteLossError,
    TransferError,
    WriteError,
)
from megatron_async_rlhf.learner.protocol import WAITING_MESSAGES, Answer, BeginPush, Command, decode_answer
from megatron_async_rlhf.learner.rollout import messages
from megatron_async_rlhf.run_secret import as_client

_ERRORS = {"": LearnerError, "non_finite": NonFiniteLossError, "transfer": TransferError, "write": WriteError}


class LearnerClient:
    """Sends one command at a time; the learner executes them in that order. BeginPush goes beside them."""

    def __init__(self, address: str, *, timeout_s: float) -> None:
        self._socket = zmq.asyncio.Context.instance().socket(zmq.PAIR)
        self._socket.set_hwm(WAITING_MESSAGES)
        as_client(self._socket)
        self._socket.connect(address)
        self._timeout_s = timeout_s
        self._next_id = 1
        self._turn = asyncio.Lock()
        self._aside: zmq.asyncio.Socket | None = None  # for BeginPush, once a push was offered
        self._turn_aside = asyncio.Lock()
        self._exchanges: set[asyncio.Task] = set()

    async def execute(self, command: Command) -> Answer:
        """Send `command` and wait for its answer. Whoever gives up waiting does not take it from the next command.

        Raises:
            NonFiniteLossError, TransferError, WriteError: the command failed in that way.
            LearnerSilentError: no answer came within `learner.timeout_s`.
            LearnerError: it failed otherwise.
        """
        exchange = asyncio.create_task(self._exchange(command))
        self._exchanges.add(exchange)
        exchange.add_done_callback(self._exchanges.discard)
        return await asyncio.shield(exchange)

    async def _exchange(self, command: Command) -> Answer:
        name = type(command).__name__
        socket, turn = self._socket, self._turn
        if isinstance(command, BeginPush):
            if self._aside is None:
                raise LearnerError("BeginPush came before a push was offered")
            socket, turn = self._aside, self._turn_aside
        async with turn:
            numbered = msgspec.structs.replace(command, id=self._next_id)
            self._next_id += 1
            try:
                async with asyncio.timeout(self._timeout_s):
                    for message in messages(numbered):
                        await socket.send(message)
                    answer = decode_answer(await socket.recv())
            except TimeoutError:
                raise LearnerSilentError(
                    f"the learner did not answer {name} within {self._timeout_s:g} s; see logs/learner.0.log, or raise "
                    "learner.timeout_s",
                    silent_s=self._timeout_s,
                ) from None
        if answer.id != numbered.id:
            raise LearnerError(f"the learner answered command {answer.id} to {name}, which was {numbered.id}")
        if answer.error is not None:
            raise _ERRORS[answer.error_kind](answer.error)
        if answer.begin_at and self._aside is None:
            self._aside = zmq.asyncio.Context.instance().socket(zmq.REQ)
            as_client(self._aside)
            self._aside.connect(answer.begin_at)
        return answer

    def close(self) -> None:
        for socket in (self._socket, self._aside):
            if socket is not None:
                socket.close(linger=0)
