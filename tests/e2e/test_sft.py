"""`async-rlhf sft` with a real learner, against Transformers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_async_rlhf.config.load import load_config
from megatron_async_rlhf.data.prompts import PromptOrder
from megatron_async_rlhf.jobs.inputs import load_run_inputs

CONFIG = Path(__file__).with_name("tiny.yaml")
STEPS = 4


def sft(directory: Path, steps: int) -> list[float]:
    """The losses it reports."""
    settings = [f"run.dir={directory}", f"warm_start.steps={steps}", "warm_start.lr_decay=constant"]
    command = [sys.executable, "-m", "megatron_async_rlhf", "sft", str(CONFIG)]
    command += [part for setting in settings for part in ("-s", setting)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    summary = json.loads((directory / "summary.json").read_text())
    assert (summary["status"], summary["steps"], summary["samples_trained"]) == ("completed", steps, steps * 8)
    assert summary["data"]["read"] == 64 + 50 == summary["data"]["used"] + sum(summary["data"]["dropped"].values())
    return [json.loads(line)["loss"] for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_exported_policy_is_the_one_it_went_on_from(tmp_path: Path):
    """A longer run's next loss is what Transformers makes of the shorter one's export on the same rows."""
    shorter, longer = sft(tmp_path / "shorter", STEPS), sft(tmp_path / "longer", STEPS + 1)
    assert longer[:STEPS] == shorter
    config = load_config(tmp_path / "longer" / "config.yaml")
    run_inputs = load_run_inputs(config, tmp_path / "longer" / "model")
    batch = PromptOrder(run_inputs.train, config.run.seed).batch(STEPS, config.warm_start.batch_size)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "shorter" / "checkpoints/final")
    losses = []
    for prompt in batch:
        row = run_inputs.solved[prompt.index]
        ids = torch.tensor([row.token_ids])
        logprobs = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        losses.append(-logprobs[row.prompt_length - 1 :])
    assert longer[STEPS] == pytest.approx(torch.cat(losses).mean().item(), abs=1e-5)
    assert longer[STEPS] < shorter[0] - 0.1


def test_without_steps_it_is_refused(tmp_path: Path):
    command = [sys.executable, "-m", "megatron_async_rlhf", "sft", str(CONFIG), "-s", "warm_start.steps=0"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "warm_start.steps = 0" in result.stderr
    assert list(tmp_path.iterdir()) == []
