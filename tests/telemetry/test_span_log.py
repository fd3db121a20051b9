"""Spans in a file: all come back in order, and a recorder does not grow with the steps of a run."""

import gc
import io
import json
import tracemalloc
from pathlib import Path

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.telemetry.events import EventStream
from megatron_async_rlhf.telemetry.files import SPANS, TRACE
from megatron_async_rlhf.telemetry.recorder import Recorder
from megatron_async_rlhf.telemetry.span_log import SpanLog
from megatron_async_rlhf.types import Span

MODEL = {"layers": 2, "hidden_size": 64, "ffn_size": 96, "heads": 2, "context_length": 96}


def span(number: int) -> Span:
    name, start = f"step {number}", 10.0 * number
    return Span(name=name, start=start, end=start + 1, process="learner", args={"version": number, "share": 0.5})


def test_spans_come_back_in_order_and_the_file_goes(tmp_path: Path):
    log, spans = SpanLog(tmp_path / SPANS), [span(number) for number in range(500)]
    assert log.read() == []
    log.add(spans[:1])
    assert log.read() == spans[:1]
    log.add(spans[1:])
    assert log.read() == spans
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_what_an_earlier_start_left_is_forgotten(tmp_path: Path):
    SpanLog(tmp_path / SPANS).add([span(0)])
    assert SpanLog(tmp_path / SPANS).read() == []


def test_a_recorder_does_not_grow(tmp_path: Path):
    recorder = Recorder(RunConfig.model_validate({"model": MODEL}), tmp_path, EventStream(io.StringIO()))

    def go_on(steps: range) -> int:
        for number in steps:
            recorder.learner_was_busy(span(number), [span(number)] * 10)
            recorder.step(number, {"reward": 0.5, "loss": 0.1, "staleness/mean": 0.0})
        gc.collect()  # what only cycles hold goes later, and how much later differs from command to command
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = go_on(range(1, 200))
        grown = go_on(range(200, 1200)) - before
    finally:
        tracemalloc.stop()
    assert grown < 1000 * 500, "of the events' pipe, which is in memory here, less than half a kilobyte a step"
    recorder.close("completed", None)
    events = json.loads((tmp_path / TRACE).read_text())["traceEvents"]
    assert sum(event["ph"] == "X" for event in events) >= 1199 * 11
    assert not (tmp_path / SPANS).exists()
