"""Every schedule and algorithm with real engines: streaming, bounds, evaluation beside training, recording, replay."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_async_rlhf.config.algorithms import SECTIONS

OWN = Path(__file__).parents[2] / "examples/own_reward"
# What is measured differs from run to run; all else must not.
MEASURED = ("time", "tokens_per_s", "model_flops_utilisation")


def reported(run) -> list[dict]:
    return [
        {name: value for name, value in line.items() if not name.startswith(MEASURED)}
        for line in run.lines("metrics.jsonl")
    ]


def assert_counts_add_up(summary: dict) -> None:
    parts = ("samples_trained", "samples_not_selected", "samples_cancelled")
    assert summary["samples_generated"] == sum(summary[part] for part in parts), summary


def completed(run) -> dict:
    output = run.wait()
    assert run.process.returncode == 0, output
    return run.summary()


@pytest.mark.slow
def test_a_streaming_run_can_be_replayed(start):
    """Scored by a function from outside the package, with columns of the data."""
    run = start(
        f"data={{train: {OWN}/prompts.jsonl, reference_fields: [letter, times], solution_field: good_answer, eval_prompts: 50}}",
        f"reward={{type: function, function: {OWN}/reward.py:score, kwargs: {{too_long: 0.05}}, on_error: zero}}",
        "schedule.generation=streaming",
        "schedule.max_staleness=2",
        "schedule.in_flight_updates=keep",
        "schedule.order=windowed",
        "schedule.eval_every=2",
        "schedule.record=true",
        "schedule.steps=6",
        "generator.max_concurrent=9",
    )
    summary = completed(run)
    assert summary["staleness"]["max"] <= 2
    assert_counts_add_up(summary)
    assert summary["samples_generated"] == 6 * 8 * 3
    lines = run.lines("metrics.jsonl")
    assert summary["rewards_failed"] == 0 and all(line["reward_failed"] == 0 for line in lines)
    assert any(line["reward"] not in (0.0, 1.0) for line in lines)
    # Of the first versions pushed after steps 2 and 4; while one is evaluated the learner may get ahead.
    steps = [int(when.split()[1]) for when in summary["eval"] if when.startswith("step")]
    assert 1 <= len(steps) <= 2 and 2 <= steps[0] <= 4 and steps[-1] < 6
    assert {"before", "after"} <= set(summary["eval"])
    for when in summary["eval"]:
        assert sum(line["when"] == when for line in run.lines("evaluations.jsonl")) == 50
    again = subprocess.run(
        [sys.executable, "-m", "megatron_async_rlhf", "replay", str(run.directory)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    assert again.returncode == 0, again.stdout
    assert "equal: " in again.stdout.splitlines()[-1]


# Not finite as soon as samples are of an older policy than the one that is trained.
LOSS = """
from megatron_async_rlhf.algorithms.ppo import clipped_policy_loss


def loss(logprobs_T, base_T, num_tokens, **others):
    loss, metrics = clipped_policy_loss(
        logprobs_T, base_T, **others, num_tokens=num_tokens, clip_low=0.2, clip_high=0.2
    )
    return loss * (float("nan") if (logprobs_T - base_T).abs().max() > 1e-3 else 1.0), metrics
"""


@pytest.mark.slow
@pytest.mark.thorough
def test_a_loss_that_is_not_finite_comes_again(start, tmp_path):
    (tmp_path / "own_loss.py").write_text(LOSS)
    settings = (
        f"algorithm={{type: grpo, loss_function: '{tmp_path}/own_loss.py:loss', samples_per_prompt: 3}}",
        "algorithm.ratio_base=sampler",
        "schedule.max_staleness=1",
        "learner.ranks=2",
    )
    run = start(*settings)
    output = run.wait()
    assert run.process.returncode == 1, output
    assert "step 2: loss nan" in output and f"async-rlhf replay {run.directory} --failed makes it come again" in output
    command = [sys.executable, "-m", "megatron_async_rlhf", "replay", str(run.directory), "--failed"]
    again = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240)
    assert again.returncode == 0, again.stdout
    assert "it came again: step 2: loss nan" in again.stdout
    resumed = start(
        *settings, "learner.learning_rate=1e-9", resume=run.directory
    )  # which changes nothing of what has been sampled
    output = resumed.wait()
    assert resumed.process.returncode == 1 and "step 2: loss nan" in output, output


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.parametrize("name", SECTIONS)
def test_async_without_staleness_is_sync_bit_for_bit(start, name: str):
    """Two rollouts of two mini-batches each, so that proximal policies and advantages are made of rollouts."""
    settings = (f"algorithm.type={name}", "schedule.steps=20", "schedule.mini_batches=2")
    runs = [start(*settings, f"schedule.mode={mode}", "schedule.max_staleness=0") for mode in ("sync", "async")]
    for run in runs:
        completed(run)
    assert reported(runs[0]) == reported(runs[1])
    weights = [(run.directory / "checkpoints/final/model.safetensors").read_bytes() for run in runs]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_both_sides_take_turns_on_all_cores(start):
    """What `async-rlhf compare` calls alternating."""
    run = start("schedule.mode=sync", "launch.cores=shared", "warm_start.steps=0", "schedule.steps=2")
    summary = completed(run)
    assert (summary["steps"], summary["weight_sync"]["mismatches"]) == (2, 0)


@pytest.mark.slow
@pytest.mark.thorough  # test_hangs.py has one that is killed and comes back
def test_a_killed_generator_comes_back_and_nothing_is_lost(start):
    """Synchronous, with seeds per request: but for float noise between batches, what is learned is the same."""
    settings = ("schedule.mode=sync", "generator.replicas=2", "schedule.steps=30")
    run = start(*settings, "launch.pin_cores=false")
    run.wait_for_step(3)
    temporary, first = [run.belongings("generator.1")[0]], run.pid("generator.1")
    run.kill("generator.1")
    run.wait_for_another("generator.1", first)
    temporary.append(run.belongings("generator.1")[0])
    assert temporary[0] != temporary[1] and not temporary[0].exists()
    summary = completed(run)
    assert not temporary[1].exists()
    assert summary["steps"] == 30
    assert_counts_add_up(summary)
    assert summary["samples_trained"] + summary["samples_not_selected"] == 30 * 8 * 3
    assert summary["weight_sync"]["mismatches"] == 0
    assert summary["weight_sync"]["bytes"] == summary["weight_sync"]["bytes_minimum"]
