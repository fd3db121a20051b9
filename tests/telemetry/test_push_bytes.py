"""`weight_sync` in summary.json counts what was to move, push by push."""

import io
from pathlib import Path

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.telemetry.events import EventStream
from megatron_async_rlhf.telemetry.recorder import Recorder
from megatron_async_rlhf.types import PushReport, Span

MODEL = {"layers": 2, "hidden_size": 64, "ffn_size": 96, "heads": 2, "context_length": 96}


def test_a_generator_that_is_lost_is_not_counted(tmp_path: Path):
    """Two receive, then one, then both again: every byte crossed once, so the two counts agree."""
    config = RunConfig.model_validate({"model": MODEL, "generator": {"replicas": 2}})
    recorder = Recorder(config, tmp_path, EventStream(io.StringIO()), generator_bytes=100)
    for generators in (2, 1, 2):
        report = PushReport(wire_bytes=generators * 100, generators=generators)
        recorder.pushed(report, [Span(name="push", start=0.0, end=1.0)])
    figures = recorder.totals.to_summary("completed", None)["weight_sync"]
    assert figures["bytes"] == figures["bytes_minimum"] == 500
    recorder.close("completed", None)
