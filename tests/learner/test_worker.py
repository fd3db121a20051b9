"""A learner process from `Stop` to its end."""

import sys
from collections.abc import Callable
from threading import Event
from types import SimpleNamespace

import pytest
import torch

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.config.sections import LearnerSection
from megatron_async_rlhf.errors import TransferError
from megatron_async_rlhf.learner.megatron import worker
from megatron_async_rlhf.learner.megatron.parallel import join_learner
from megatron_async_rlhf.learner.megatron.transfer.weight_push import WeightPush
from megatron_async_rlhf.learner.protocol import Stop

MODEL = {"layers": 1, "hidden_size": 32, "ffn_size": 32, "heads": 1, "context_length": 32}
PLACEMENT = SimpleNamespace(rank=0, device=torch.device("cpu"), control=None)


def test_stop_closes_the_push_before_the_groups_of_training(monkeypatch):
    """The controller has its answer first: it does not wait for NCCL."""
    happened = []
    channel = SimpleNamespace(
        receive=lambda: Stop(id=7),
        answer=lambda answer: happened.append(f"answered {answer.id}"),
        close=lambda: happened.append("channel closed"),
    )
    learner = SimpleNamespace(close=lambda: happened.append("push closed"))
    for name, replacement in {
        "load_config": lambda path: SimpleNamespace(model=None, learner=None, run=SimpleNamespace(device="cpu")),
        "policy_architecture": lambda *arguments: None,
        "join_learner": lambda *arguments: PLACEMENT,
        "MegatronLearner": lambda *arguments: learner,
        "CommandChannel": lambda *arguments: channel,
    }.items():
        monkeypatch.setattr(worker, name, replacement)
    monkeypatch.setattr(worker.signal, "signal", lambda *arguments: None)
    monkeypatch.setattr(worker.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(worker.dist, "destroy_process_group", lambda: happened.append("group destroyed"))
    monkeypatch.setattr(sys, "argv", ["worker", "--run-dir", "runs/x", "--listen", "tcp://127.0.0.1:1"])
    worker.main()
    assert happened == ["answered 7", "push closed", "channel closed", "group destroyed"]


def test_a_closed_push_has_left_its_group_and_ended_its_thread(monkeypatch):
    """A push that waits for a generator ends when the group is left, as NCCL's do."""
    monkeypatch.setattr(worker.dist, "get_world_size", lambda: 1)
    config = RunConfig.model_validate({"model": MODEL})
    push = WeightPush(config, None, PLACEMENT, {})

    class Transport:
        """Its parcels wait until it is closed."""

        def __init__(self) -> None:
            self.closed = Event()

        def close(self) -> None:
            self.closed.set()

    class Sender:
        def __init__(self, transport: Transport) -> None:
            self._transport = transport

        def push(self, weights, *, verify: bool, begin: Callable[[], bool]):
            assert begin()
            assert self._transport.closed.wait(30)
            raise TransferError("the group was left")

    push._transport = Transport()
    push._sender = Sender(push._transport)
    push.start(verify=False)
    ending, transport = push._under_way.ending, push._transport
    push.close()
    assert transport.closed.is_set()
    assert ending.result(0).error == "the group was left"
    with pytest.raises(RuntimeError, match="shutdown"):
        push._thread.submit(print)


@pytest.mark.parametrize(("given", "threads"), [({}, 3), ({"OMP_NUM_THREADS": "2"}, 2)])
def test_a_rank_has_the_threads_that_it_was_started_with(monkeypatch: pytest.MonkeyPatch, given: dict, threads: int):
    """With `launch.cores: shared` more than the configuration says."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    set_to: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(KeyError):
        join_learner(LearnerSection(threads=3), "cpu")
    assert set_to == [threads]
