"""The command channel, with the learner's end played by the test."""

import asyncio

import msgspec
import pytest
import zmq
import zmq.asyncio

from megatron_async_rlhf.errors import LearnerError
from megatron_async_rlhf.learner.client import LearnerClient
from megatron_async_rlhf.learner.protocol import Answer, FinishPush, Stop, WaitUntilReady, decode_command, encode_answer


def with_learner(body, timeout_s: float = 10.0) -> None:
    async def whole() -> None:
        socket = zmq.asyncio.Context.instance().socket(zmq.PAIR)
        client = LearnerClient(f"tcp://127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}", timeout_s=timeout_s)
        try:
            async with asyncio.timeout(20):
                await body(client, socket)
        finally:
            client.close()
            socket.close(linger=0)

    asyncio.run(whole())


def test_an_answer_that_nobody_waits_for_any_more_is_not_the_next_commands():
    async def body(client: LearnerClient, socket: zmq.asyncio.Socket) -> None:
        given_up = asyncio.create_task(client.execute(FinishPush()))
        first = decode_command(await socket.recv())
        given_up.cancel()
        await asyncio.wait([given_up])
        assert given_up.cancelled()
        following = asyncio.create_task(client.execute(WaitUntilReady()))
        await socket.send(encode_answer(Answer(id=first.id, saved=True)))
        second = decode_command(await socket.recv())
        assert (type(first), type(second)) == (FinishPush, WaitUntilReady)
        await socket.send(encode_answer(Answer(id=second.id)))
        assert await following == Answer(id=second.id)

    with_learner(body)


def test_errors_and_silence_are_told():
    async def body(client: LearnerClient, socket: zmq.asyncio.Socket) -> None:
        failing = asyncio.create_task(client.execute(WaitUntilReady()))
        command = decode_command(await socket.recv())
        await socket.send(
            encode_answer(msgspec.structs.replace(Answer(id=command.id), error="rank 1: no", error_kind=""))
        )
        with pytest.raises(LearnerError, match="rank 1: no"):
            await failing
        with pytest.raises(LearnerError, match="did not answer Stop within 0.3 s; .* raise learner.timeout_s"):
            await client.execute(Stop())

    with_learner(body, timeout_s=0.3)
