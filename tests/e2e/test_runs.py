import json

import pytest
import torch
from documented_keys import documented
from tiny_reward_model import make_reward_model, scores_of
from trace_nesting import dropped, slices
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_async_rlhf.config.load import load_config
from megatron_async_rlhf.config.metrics import metric_names

LAYOUTS = [
    # What these two show of the schedule, simulations do too; one rank each runs in test_schedules.py and others.
    pytest.param((1, 1, 1), "async", 1, False, id="tp1-generator-tp1", marks=pytest.mark.thorough),
    pytest.param((1, 2, 1), "sync", 1, False, id="pp2-generator-tp1-sync", marks=pytest.mark.thorough),
    pytest.param((2, 2, 2), "async", 2, True, id="tp2-pp2-generator-tp2-reward-model"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "mode", "bound", "has_reward_model"), LAYOUTS)
def test_a_run_in_every_layout(start, tmp_path, layout, mode, bound, has_reward_model):
    tensor, pipeline, generator_tensor = layout
    reward = f"{{type: reward_model, model: {tmp_path / 'rm'}, center_on_solutions: 8}}"
    if has_reward_model:
        make_reward_model(tmp_path / "rm")
    run = start(
        f"reward={reward if has_reward_model else '{type: builtin}'}",
        f"learner.tensor_parallel={tensor}",
        f"learner.pipeline_parallel={pipeline}",
        f"generator.tensor_parallel={generator_tensor}",
        f"schedule.mode={mode}",
        f"schedule.max_staleness={bound}",
        "generator.eval_temperature=0",
        "telemetry.wandb={mode: offline}",
    )
    run.wait_for_step(1)
    temporary, shared = run.belongings("generator.0")
    assert any(path.is_socket() for path in temporary.iterdir())
    assert shared or generator_tensor == 1  # then the worker is in the engine's process
    output = run.wait()
    assert run.process.returncode == 0, output
    assert not [path for path in (temporary, *shared) if path.exists()]
    summary = run.summary()
    in_force = 0 if mode == "sync" else bound
    assert (summary["status"], summary["mode"], summary["max_staleness"]) == ("completed", mode, in_force)
    assert summary["steps"] == 4
    assert summary["data"]["read"] == 64 + 50 == summary["data"]["used"] + sum(summary["data"]["dropped"].values())
    assert summary["staleness"]["max"] <= in_force
    if in_force == 1:  # the paper's schedule: the first batch on-policy, every later one a step off
        assert [line["staleness/max"] for line in run.lines("metrics.jsonl")] == [0, 1, 1, 1]
    pushes = summary["weight_sync"]
    assert (pushes["mismatches"], pushes["verified"], pushes["count"]) == (
        0,
        5 if in_force < 2 else pushes["count"],
        pushes["verified"],
    )
    assert pushes["digests_compared"] > 0
    assert 0 < summary["logprob_gap"]["tokens"]
    assert summary["logprob_gap"]["max_abs"] <= 1e-4
    assert summary["samples_generated"] == 4 * 8 * 3 == summary["samples_trained"] + summary["samples_not_selected"]
    assert set(summary["eval"]) == {"before", "after"}
    assert [line["step"] for line in run.lines("metrics.jsonl")] == [1, 2, 3, 4]
    config = load_config(run.directory / "config.yaml")
    known = {"step", "time", *metric_names(config.algorithm, config.rewards)}
    assert {name for line in run.lines("metrics.jsonl") for name in line} <= known
    assert_names_are_documented(run)
    trace = json.loads((run.directory / "trace.json").read_text())
    assert not dropped(trace)
    events = trace["traceEvents"]
    assert {"generator.0", "learner", "learner.0", "weights", "evaluation"} <= {
        e["args"]["name"] for e in events if e["ph"] == "M"
    }
    if has_reward_model:
        assert_rewards_are_the_models(run, tmp_path / "rm")
    assert list((run.directory / "wandb").glob("offline-run-*"))
    assert_export_answers_like_the_generators(run)


def assert_names_are_documented(run):
    for file in ("metrics.jsonl", "warm_start.jsonl"):
        assert {name for line in run.lines(file) for name in line} <= set(documented("metrics.jsonl"))
    assert set(run.summary()) == {name.split(".")[0] for name in documented("summary.json")} - {"log_tail"}
    trace = json.loads((run.directory / "trace.json").read_text())
    parts = slices(trace)["learner.0", "train"]
    assert [e["args"]["version"] for e in parts if e["name"] == "optimizer" and "args" in e] == [1, 2, 3, 4]
    assert {name for event in trace["traceEvents"] if event["ph"] == "X" for name in event.get("args", {})} == set(
        documented("trace.json")
    )


def assert_rewards_are_the_models(run, directory):
    """Of held-out completions that ended, those that Transformers computes; every completion is in the server's lane."""
    center = json.loads((run.directory / "reward_centers.json").read_text())["reward"]
    lines = run.lines("evaluations.jsonl")
    expected = scores_of(directory, ((line["prompt"], line["completion"]) for line in lines))
    for line, score in zip(lines, expected, strict=True):
        assert line["reward"] + center == pytest.approx(score, abs=1e-4)
    assert 0 < run.summary()["reward_busy_seconds"] <= run.summary()["wall_seconds"]
    spans = slices(json.loads((run.directory / "trace.json").read_text()))["reward.0", "reward.0"]
    assert sum(span["args"]["samples"] for span in spans) == 4 * 8 * 3 + 2 * 50 + 8


def assert_export_answers_like_the_generators(run):
    """Greedy answers of the exported policy in Transformers against those of the last weights pushed to vLLM."""
    exported = run.directory / "checkpoints/final"
    model = AutoModelForCausalLM.from_pretrained(exported)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    after = [line for line in run.lines("evaluations.jsonl") if line["when"] == "after"]
    assert len(after) == 50
    for line in after:
        prompt = torch.tensor([line["prompt_token_ids"]])
        answer = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=12,
            pad_token_id=tokenizer.pad_token_id,
        )[0, prompt.shape[1] :].tolist()
        assert answer == line["token_ids"]
