"""Whether a push that was offered begins: one verdict, whoever is first, on all ranks."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch.distributed as dist
import zmq
import zmq.asyncio

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import LearnerError, TransferError
from megatron_async_rlhf.learner.client import LearnerClient
from megatron_async_rlhf.learner.megatron.transfer import weight_push
from megatron_async_rlhf.learner.megatron.transfer.push_offers import PushOffers
from megatron_async_rlhf.learner.megatron.transfer.weight_push import WeightPush
from megatron_async_rlhf.learner.protocol import Answer, BeginPush, PushWeights, decode_command, encode_answer
from megatron_async_rlhf.types import PushReport

HOST = "127.0.0.1"
MODEL = {"layers": 1, "hidden_size": 32, "ffn_size": 32, "heads": 1, "context_length": 32}


@pytest.fixture
def alone(monkeypatch):
    """One rank, which needs no process group."""
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    return SimpleNamespace(rank=0, device=SimpleNamespace(type="cpu"), control=None)


@pytest.fixture
def offers(alone):
    made = PushOffers(alone, timeout_s=10)
    yield made
    made.close()


def test_it_begins_once_and_only_the_version_on_offer(offers):
    assert not offers.begin(3), "nothing is on offer"
    offers.make(3)
    assert not offers.begin(2)
    assert offers.begin(3) and offers.verdict()
    assert not offers.begin(3)


def test_it_does_not_begin_once_weights_are_about_to_change(offers):
    offers.make(3)
    offers.withdraw()
    assert not offers.begin(3) and not offers.verdict()
    offers.make(4)
    assert offers.begin(4) and offers.verdict()
    offers.withdraw()
    assert offers.verdict()


def test_both_sides_agree_however_they_race(offers):
    begun = 0
    with ThreadPoolExecutor(1) as controller:
        for version in range(300):
            offers.make(version)
            together = threading.Barrier(2)

            def begin(version: int = version, together: threading.Barrier = together) -> bool:
                together.wait(10)
                return offers.begin(version)

            asked = controller.submit(begin)
            together.wait(10)
            offers.withdraw()
            assert asked.result(10) == offers.verdict()
            begun += asked.result()
    assert 0 <= begun <= 300


def test_the_controller_is_answered_while_the_learner_executes_another_command(offers):
    async def whole() -> None:
        socket = zmq.asyncio.Context.instance().socket(zmq.PAIR)
        client = LearnerClient(f"tcp://{HOST}:{socket.bind_to_random_port(f'tcp://{HOST}')}", timeout_s=10)
        try:
            with pytest.raises(LearnerError, match="before a push was offered"):
                await client.execute(BeginPush(version=5))
            offers.listen(HOST)
            offers.make(5)
            offering = asyncio.create_task(client.execute(PushWeights(version=5, verify=True, offered=True)))
            command = decode_command(await socket.recv())
            await socket.send(encode_answer(Answer(id=command.id, begin_at=offers.address)))
            await offering
            busy = asyncio.create_task(client.execute(PushWeights(version=6, verify=True)))
            assert not (await client.execute(BeginPush(version=4))).begun
            assert (await client.execute(BeginPush(version=5))).begun
            assert not busy.done()
            busy.cancel()
        finally:
            client.close()
            socket.close(linger=0)

    asyncio.run(whole())


class Sender:
    """Sends when it is allowed to."""

    def __init__(self) -> None:
        self.may_end = threading.Event()
        self.pushes = 0

    def push(self, weights, *, verify: bool, begin: Callable[[], bool]) -> PushReport | None:
        if not begin():
            return None
        self.pushes += 1
        assert self.may_end.wait(30)
        return PushReport(wire_bytes=8)


@pytest.fixture
def push(alone, monkeypatch):
    monkeypatch.setattr(weight_push, "of_all_ranks", lambda mine, kind, group: [mine])
    made = WeightPush(RunConfig.model_validate({"model": MODEL}), None, alone, {})
    sender = made._sender = Sender()
    made._offers.listen(HOST)
    yield made
    sender.may_end.set()
    made.close()


def test_a_push_that_nobody_took_is_dropped_and_the_next_one_starts(push):
    assert push.start(verify=True, offered=0).startswith(f"tcp://{HOST}:")
    push.wait_until_weights_may_change()
    assert push._sender.pushes == 0
    with pytest.raises(LearnerError, match="FinishPush came without"):
        push.finish()
    push._sender.may_end.set()
    push.start(verify=True)
    assert push.finish()[0].wire_bytes == 8


def test_weights_do_not_change_before_a_push_that_was_taken_has_read_them(push):
    push.start(verify=True, offered=7)
    assert push._offers.begin(7)
    changing = threading.Thread(target=push.wait_until_weights_may_change)
    changing.start()
    changing.join(0.2)
    assert changing.is_alive()
    push._sender.may_end.set()
    changing.join(10)
    assert not changing.is_alive()
    assert push.finish()[0].wire_bytes == 8


def test_a_push_that_is_still_on_offer_does_not_keep_the_learner_from_ending(push):
    sender = push._sender
    push.start(verify=True, offered=7)
    push.close()
    assert sender.pushes == 0


@pytest.mark.parametrize("taken", [True, False])
def test_a_rank_that_cannot_pack_hears_the_verdict_with_the_others(push, taken):
    heard = []

    def fail(weights, *, verify: bool, begin: Callable[[], bool]) -> None:
        raise TransferError("pack: the learner's model is not the planned one")

    def verdict(ask=push._offers.verdict) -> bool:
        heard.append(ask())
        return heard[-1]

    push._sender.push, push._offers.verdict = fail, verdict
    push.start(verify=True, offered=7)
    if taken:
        assert push._offers.begin(7)
        with pytest.raises(TransferError, match="pack: the learner"):
            push.finish()
    push.wait_until_weights_may_change()
    assert heard == [taken] and push._under_way is None
