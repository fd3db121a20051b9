"""The last words about a run."""

import io
import json
from pathlib import Path

from rich.console import Console

from megatron_async_rlhf.launch.display import Display


def last_words(run_dir: Path, status: str = "completed") -> list[str]:
    output = io.StringIO()
    Display(Console(file=output, width=200)).finished(status, None, [], run_dir)
    return output.getvalue().splitlines()


def leave(run_dir: Path, evaluations: dict, *, exported: bool) -> None:
    (run_dir / "summary.json").write_text(json.dumps({"eval": evaluations}))
    (run_dir / "checkpoints/final").mkdir(parents=True)
    if exported:
        (run_dir / "checkpoints/final/model-00001.safetensors").write_bytes(b"")


def test_a_completed_run_says_what_it_came_to_and_where_its_policy_is(tmp_path):
    before = {"reward": 0.41397, "reward_penalised": 0.41397, "exact": 0.2129, "logprob_gap": 5e-7}
    after = {"reward": 0.554, "reward_penalised": 0.554, "exact": 0.3789, "logprob_gap": 5e-7}
    leave(tmp_path, {"before": before, "step 50": {"reward": 0.5}, "after": after}, exported=True)
    completed, held_out, policy = last_words(tmp_path)
    assert completed.endswith(f"completed: {tmp_path}")
    assert held_out == "  held-out, before and after: reward 0.414 -> 0.554, exact 0.2129 -> 0.3789"
    assert policy == f"  model, as a Hugging Face directory: {tmp_path}/checkpoints/final"


def test_penalties_that_count_are_told_apart(tmp_path):
    before, after = {"reward": 0.5, "reward_penalised": 0.25}, {"reward": 0.5, "reward_penalised": 0.5}
    leave(tmp_path, {"before": before, "after": after}, exported=False)
    assert last_words(tmp_path)[1:] == ["  held-out, before and after: reward 0.5 -> 0.5, reward_penalised 0.25 -> 0.5"]


def test_a_run_that_came_to_nothing_claims_nothing(tmp_path):
    leave(tmp_path, {"before": {"reward": 0.5}}, exported=False)
    assert len(last_words(tmp_path, "failed")) == 1
    (tmp_path / "summary.json").unlink()
    assert len(last_words(tmp_path, "interrupted")) == 1
