"""Lines of a run, also of one that version 0.1.0 made, which counted steps from 0."""

import json

import pytest

from megatron_async_rlhf.telemetry.files import read_steps
from megatron_async_rlhf.telemetry.summary import RunTotals


def write(path, steps: list[int]) -> None:
    path.write_text("".join(json.dumps({"step": step, "loss": step / 2}) + "\n" for step in steps))


@pytest.mark.parametrize("steps", [[0, 1, 2], [1, 2, 3]])
def test_step_n_is_the_nth_whoever_wrote_it(tmp_path, steps):
    write(tmp_path / "metrics.jsonl", steps)
    assert [line["step"] for line in read_steps(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_several_lines_of_a_step_stay_together(tmp_path):
    write(tmp_path / "samples.jsonl", [0, 0, 1])
    assert [line["step"] for line in read_steps(tmp_path / "samples.jsonl")] == [1, 1, 2]
    assert read_steps(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize(
    ("status", "dropped", "waiting"), [("completed", 3, 0), ("interrupted", 0, 3), ("failed", 0, 3)]
)
def test_samples_add_up(status, dropped, waiting):
    totals = RunTotals(mode="async", algorithm="online_dpo", staleness_bound=1, samples_generated=20)
    totals.samples_trained, totals.samples_not_selected, totals.samples_cancelled, totals.pairs_skipped = 6, 9, 2, 1
    summary = totals.to_summary(status, None)
    assert (summary["samples_dropped"], summary["samples_waiting"]) == (dropped, waiting)
    parts = ("trained", "not_selected", "cancelled", "dropped", "waiting")
    assert summary["samples_generated"] == sum(summary[f"samples_{part}"] for part in parts)
    assert summary["pairs_skipped"] == 1


def test_without_generators_nothing_was_lost():
    totals = RunTotals(mode="sync", algorithm="sft", staleness_bound=0, samples_trained=64)
    assert totals.to_summary("completed", None)["samples_dropped"] == 0
