"""A real reward model behind a real vLLM pooling server, which is stopped while the run goes on."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from test_hangs import stop
from tiny_reward_model import make_reward_model
from trace_nesting import dropped, slices
from transformers import AutoModelForSequenceClassification, AutoTokenizer

STEPS = 8
PARTS = {"engine": "VLLM::EngineCore", "worker": "VLLM::Worker_TP1"}


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("how", "generation", "workers"),
    [
        ("engine", "streaming", 1),
        pytest.param("killed", "batch", 1, marks=pytest.mark.thorough),
        pytest.param("worker", "batch", 2, marks=pytest.mark.thorough),
    ],
)
def test_a_lost_reward_model_costs_a_restart_and_no_score(start, tmp_path, how, generation, workers):
    model = make_reward_model(tmp_path / "rm")
    run = start(
        f"reward={{type: reward_model, model: {model}, center_on_solutions: 8, request_timeout_s: 8}}",
        f"reward.tensor_parallel={workers}",
        f"schedule={{steps: {STEPS}, generation: {generation}}}",
        "algorithm.missing_eos_reward=null",
        "launch.pin_cores=false",
    )
    run.wait_for_step(2)
    pid = run.pid("reward.0")
    if how == "killed":
        os.kill(pid, signal.SIGKILL)
    else:
        stop(run, "reward.0", PARTS[how])
    output = run.wait()
    assert run.process.returncode == 0, output
    assert run.pid("reward.0") != pid, output
    assert "reward.0 was killed by SIGKILL; started again (1 of 3)" in output and "reward.0 is back" in output
    if how != "killed":
        assert "reward.0: has answered no request for 8 s" in output
    summary = run.summary()
    assert (summary["status"], summary["steps"], summary["samples_cancelled"]) == ("completed", STEPS, 0)
    assert summary["samples_generated"] == summary["samples_trained"] + summary["samples_not_selected"]
    assert summary["samples_generated"] == STEPS * 8 * 3
    assert 0 < summary["reward_busy_seconds"] <= summary["wall_seconds"]
    assert_scores_are_those_of_transformers(run, model)
    assert_lane_has_every_completion(run)


def assert_scores_are_those_of_transformers(run, directory: Path) -> None:
    """Of held-out completions before and after, the second ones by the server that was started again."""
    model = AutoModelForSequenceClassification.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    center = json.loads((run.directory / "reward_centers.json").read_text())["reward"]
    lines = run.lines("evaluations.jsonl")
    assert len(lines) == 100
    for line in lines:
        turns = [{"role": "user", "content": line["prompt"]}, {"role": "assistant", "content": line["completion"]}]
        ids = tokenizer.apply_chat_template(turns, return_dict=False)
        with torch.no_grad():
            score = model(torch.tensor([ids])).logits.item()
        assert line["reward"] == pytest.approx(score - center, abs=1e-4)


def assert_lane_has_every_completion(run) -> None:
    trace = json.loads((run.directory / "trace.json").read_text())
    assert not dropped(trace)
    scored = slices(trace)["reward.0", "reward.0"]
    # Those that were trained on or passed over, two evaluations, and the solutions that scores are centred on.
    assert sum(event["args"].get("samples", 0) for event in scored if "args" in event) == STEPS * 8 * 3 + 2 * 50 + 8
