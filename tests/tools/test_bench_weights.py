"""What `tools/bench_weights.py` asks of the machine it measures."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

SOURCE = Path(__file__).parents[2] / "tools/bench_weights.py"


@pytest.fixture
def bench():
    spec = importlib.util.spec_from_file_location("bench_weights", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_on_a_gpu_the_peak_is_torchs_alone(bench, monkeypatch):
    """Containers with GPUs often have no `/proc/self/clear_refs` to write to."""
    forgotten = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", forgotten.append)
    monkeypatch.setattr(bench, "Path", lambda path: pytest.fail(f"{path} was touched"))
    told = []
    pipe = SimpleNamespace(send=told.append, recv=lambda: None)
    member = SimpleNamespace(device=torch.device("cuda"))
    member.forget_peak = lambda: bench.Member.forget_peak(member)
    bench.serve(lambda *arguments: member, None, 0, 0, pipe)
    assert told == ["ready"]
    assert forgotten == [torch.device("cuda")]
