"""Sinks beside W&B, each read back with what its own users read it with."""

import ast
import io
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from small_config import small_config
from tensorboardX.proto import event_pb2

from megatron_async_rlhf.config.telemetry import PrometheusKeys, TelemetrySection
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.telemetry import recorder as recording
from megatron_async_rlhf.telemetry.events import EventStream
from megatron_async_rlhf.telemetry.files import read_lines
from megatron_async_rlhf.telemetry.sinks import opening
from megatron_async_rlhf.telemetry.sinks.ending import is_one_ending
from megatron_async_rlhf.telemetry.sinks.opening import check_sinks
from megatron_async_rlhf.telemetry.sinks.sink import Sink
from megatron_async_rlhf.telemetry.sinks.tensorboard import TensorBoardSink

SECTIONS = {"model": {"layers": 2, "hidden_size": 64, "ffn_size": 96, "heads": 2, "context_length": 96}}


def tell(sink: Sink, first: int = 1, last: int = 3) -> None:
    sink.warm_start(1, {"step": 1, "time": 5.0, "loss": 2.0})
    for step in range(first, last + 1):
        sink.step(step, {"step": step, "time": 5.0, "loss": float(step), "time/train_s": 0.5, "note": "no number"})
    sink.evaluation(last, last, {"eval/reward": 0.75})
    sink.close({}, failed=False)


def records(path: Path) -> Iterator[bytes]:
    """Each is its length, a checksum, itself, and another checksum."""
    data, at = path.read_bytes(), 0
    while at < len(data):
        (size,) = struct.unpack_from("<Q", data, at)
        yield data[at + 12 : at + 12 + size]
        at += size + 16


def scalars(directory: Path) -> list[tuple[str, int, float]]:
    events = [event_pb2.Event.FromString(record) for path in sorted(directory.iterdir()) for record in records(path)]
    return [(value.tag, event.step, value.simple_value) for event in events for value in event.summary.value]


def test_tensorboard_has_a_curve_of_each_metric(tmp_path):
    tell(TensorBoardSink(tmp_path, warm_start=6))
    assert scalars(tmp_path / "tensorboard") == [
        ("warm_start/loss", -5, 2.0),  # never beyond the step from which a resumed run makes others
        *((name, step, value) for step in (1, 2, 3) for name, value in (("loss", step), ("time/train_s", 0.5))),
        ("eval/reward", 3, 0.75),
    ]


def test_tensorboard_forgets_what_a_resumed_run_makes_again(tmp_path):
    tell(TensorBoardSink(tmp_path, warm_start=6))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    time.sleep(1.1)  # its files have names by the second
    tell(TensorBoardSink(tmp_path, warm_start=6), first=3)
    files = sorted((tmp_path / "tensorboard").glob("events.*"))
    assert len(files) == 2
    starts = [event_pb2.Event.FromString(record) for record in records(files[1])]
    assert any(event.session_log.status == event_pb2.SessionLog.START and event.step == 3 for event in starts)


TRACKIO = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_sinks import SECTIONS, tell
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.config.telemetry import TrackioKeys
from megatron_async_rlhf.telemetry.sinks.trackio import TrackioSink
config = RunConfig.model_validate(SECTIONS | {"run": {"name": "one"}, "warm_start": {"steps": 2}})
tell(TrackioSink(config, TrackioKeys(project="tests"), Path(sys.argv[1])))
from trackio.sqlite_storage import SQLiteStorage
for line in SQLiteStorage.get_logs("tests", "one"):
    print({k: v for k, v in line.items() if k != "timestamp"})
"""


@pytest.mark.skipif(find_spec("trackio") is None, reason="needs trackio: pip install trackio (not with vLLM's pillow)")
def test_trackio_has_the_run(tmp_path):
    command = [sys.executable, "-c", TRACKIO, str(tmp_path), str(Path(__file__).parent)]
    told = subprocess.run(
        command,
        env=os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert told.returncode == 0, told.stderr
    lines = [ast.literal_eval(line) for line in told.stdout.splitlines() if line.startswith("{")]
    steps = {line["step"]: line for line in lines if "loss" in line}
    assert [steps[n]["loss"] for n in (1, 2, 3)] == [1.0, 2.0, 3.0]
    assert any(line.get("eval/reward") == 0.75 and line["step"] == 3 for line in lines)
    assert any(line.get("warm_start/loss") == 2.0 and line["step"] == -1 for line in lines)


def test_prometheus_is_told_the_newest_values():
    from megatron_async_rlhf.telemetry.sinks.prometheus import PrometheusSink

    sink = PrometheusSink(PrometheusKeys(port=0, host="127.0.0.1"), "name of the run")
    for step in (1, 2):
        sink.step(step, {"step": step, "time": 5.0, "loss": float(step), "time/train_s": 0.5})
    text = urllib.request.urlopen(f"http://127.0.0.1:{sink.port}/metrics", timeout=10).read().decode()
    assert 'async_rlhf_loss{run="name of the run"} 2.0' in text and "async_rlhf_time_train_s" in text
    sink.close({}, failed=False)
    with pytest.raises(OSError):
        urllib.request.urlopen(f"http://127.0.0.1:{sink.port}/metrics", timeout=1)


def test_a_port_that_is_taken_is_named():
    from megatron_async_rlhf.telemetry.sinks.prometheus import PrometheusSink

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"telemetry.prometheus.port = {port}: cannot be listened on"):
            PrometheusSink(PrometheusKeys(port=port, host="127.0.0.1"), "run")


@pytest.mark.parametrize("key", ["wandb", "tensorboard", "trackio", "prometheus"])
def test_a_sink_without_its_package_is_refused_before_the_run_starts(key: str, monkeypatch):
    check_sinks(TelemetrySection())
    monkeypatch.setattr(opening, "find_spec", lambda package: None)
    check_sinks(TelemetrySection())
    with pytest.raises(ConfigError, match=f"telemetry.{key} needs .* -m pip install"):
        check_sinks(TelemetrySection.model_validate({key: key == "tensorboard" or {}}))


class Shown:
    """A sink that hears of steps until its service dies."""

    def __init__(self, steps: int = 1000) -> None:
        self.steps, self.last, self.closed = list[int](), steps, False

    def step(self, step: int, values: dict) -> None:
        self.steps.append(step)
        if step > self.last:
            raise ConnectionResetError("Connection lost")

    def close(self, summary: dict, *, failed: bool) -> None:
        self.closed = True
        assert not failed


def test_a_run_outlives_a_service_that_shows_it(tmp_path: Path, monkeypatch):
    dying, living = Shown(steps=1), Shown()
    monkeypatch.setattr(recording, "open_sinks", lambda config, run_dir: [dying, living])
    told = io.StringIO()
    recorder = recording.Recorder(small_config(tmp_path, 0), tmp_path, EventStream(told))
    for step in range(1, 5):
        recorder.step(step, {"reward": 1.0, "staleness/mean": 0.0})
    assert recorder.close("completed", None)
    assert (dying.steps, living.steps) == ([1, 2], [1, 2, 3, 4])
    assert dying.closed and living.closed
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 4
    (note,) = (line for line in told.getvalue().splitlines() if '"note"' in line)
    assert "Shown failed and gets no more steps, which metrics.jsonl has" in note and "Connection lost" in note


class Unreachable(Shown):
    """Its service does not take in the end, for as long as `is_reached` is unset."""

    is_reached = threading.Event()

    def close(self, summary: dict, *, failed: bool) -> None:
        self.is_reached.wait()
        super().close(summary, failed=failed)


def test_a_run_ends_without_a_service_that_does_not_take_it_in(tmp_path: Path, monkeypatch):
    hanging, living = Unreachable(), Shown()
    monkeypatch.setattr(recording, "open_sinks", lambda config, run_dir: [hanging, living])
    impatient = TelemetrySection(close_timeout_s=0.2)
    config = small_config(tmp_path, 0).model_copy(update={"telemetry": impatient})
    told = io.StringIO()
    recorder = recording.Recorder(config, tmp_path, EventStream(told))
    assert recorder.close("completed", None)
    assert living.closed and not hanging.closed and is_one_ending()
    *_, note, closed = told.getvalue().splitlines()
    assert "Unreachable was not done within telemetry.close_timeout_s = 0.2" in note and '"closed"' in closed
    hanging.is_reached.set()
    deadline = time.monotonic() + 60
    while is_one_ending():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert hanging.closed
