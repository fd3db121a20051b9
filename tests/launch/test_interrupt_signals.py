"""Which signals count as an interrupt, and how often."""

import os
import signal
from collections.abc import Iterator

import pytest

from megatron_async_rlhf.launch import terminal


@pytest.fixture
def interrupts() -> Iterator[list[int]]:
    came: list[int] = []
    with terminal.handling_interrupts(lambda number, frame: came.append(number)):
        yield came


def test_a_scheduler_and_a_parent_that_both_say_so_count_once(interrupts: list[int], monkeypatch):
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGTERM)
    assert interrupts == [signal.SIGTERM]
    monkeypatch.setattr(terminal, "_ECHO_S", 0.0)  # for that long nothing came
    os.kill(os.getpid(), signal.SIGTERM)
    assert interrupts == [signal.SIGTERM] * 2


def test_whoever_presses_ctrl_c_twice_means_it(interrupts: list[int]):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGINT):
        os.kill(os.getpid(), number)
    assert interrupts == [signal.SIGTERM, signal.SIGINT, signal.SIGINT]
