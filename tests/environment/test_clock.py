"""Time that advances steadily whatever becomes of the machine's clock."""

import time

from megatron_async_rlhf import clock


def test_a_clock_that_is_set_changes_nothing(monkeypatch):
    before, wall = clock.now(), time.time()
    assert abs(before - wall) < 60  # it is the time of day
    monkeypatch.setattr(clock.time, "time", lambda: wall - 3600.0)
    assert 0.0 <= clock.now() - before < 60
