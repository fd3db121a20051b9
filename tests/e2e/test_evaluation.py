"""`async-rlhf eval` with real vLLM servers, against Transformers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_async_rlhf.config.load import load_config
from megatron_async_rlhf.converter.convert import import_hf
from megatron_async_rlhf.jobs.inputs import make_model_template

CONFIG = Path(__file__).with_name("tiny.yaml")
SAMPLES, PROMPTS = 2, 6


def make_model(directory: Path, seed: int) -> Path:
    """Different for each seed, but not so far from each other that a divergence says nothing."""
    make_model_template(load_config(CONFIG), directory)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(directory)
    return directory


def evaluate(directory: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "megatron_async_rlhf", "eval", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=directory)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
@pytest.mark.thorough
def test_log_probabilities_are_those_of_transformers(tmp_path: Path):
    """The policy is a checkpoint, which is exported and then loaded by vLLM as any other program would."""
    policy, sft = make_model(tmp_path / "policy", 1), make_model(tmp_path / "sft", 2)
    import_hf(policy, tmp_path / "saved", tensor_parallel=1, pipeline_parallel=1, dtype=None)
    section = f"{{against: references, kl_to: {sft}, samples: {SAMPLES}, k: [1, 2], temperature: 0.7, bootstrap: 200}}"
    settings = ["model={hf: saved}", f"eval={section}", f"data.eval_prompts={PROMPTS}", "run.dir=out"]
    options = [part for setting in settings for part in ("-s", setting)]
    output = evaluate(tmp_path, str(CONFIG), *options)
    assert "win_rate" in output and "completed" in output
    out = tmp_path / "out"
    content = json.loads((out / "eval.json").read_text())
    lines = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert (content["prompts"], len(lines)) == (PROMPTS, PROMPTS)
    assert content["wins"]["won"] + content["wins"]["tied"] + content["wins"]["lost"] == PROMPTS * SAMPLES

    kept = [json.loads(line) for line in (out / "progress/policy.jsonl").read_text().splitlines()]
    token_ids = {line["prompt"]: [answer["token_ids"] for answer in line["value"]] for line in kept}
    prompts = load_config(out / "config.yaml")
    expected = _logprobs(policy, sft, out, prompts, token_ids)
    for line in lines:
        for answer, (ours, theirs) in zip(line["policy"], expected[line["index"]], strict=True):
            assert answer["logprob"] == pytest.approx(ours, abs=1e-3)
            assert answer["kl_to_logprob"] == pytest.approx(theirs, abs=1e-3)
    gaps = [ours - theirs for pairs in expected.values() for ours, theirs in pairs]
    assert content["kl"]["kl_k1"]["mean"] == pytest.approx(sum(gaps) / len(gaps), abs=1e-3)

    (out / "eval.json").unlink()
    (out / "progress/policy_scores.jsonl").unlink()
    again = evaluate(tmp_path, "out", "--resume")  # scores once more; no server is needed for that
    assert "serve" not in again
    assert json.loads((out / "eval.json").read_text()) == content


def _logprobs(policy: Path, sft: Path, out: Path, config, token_ids: dict) -> dict[int, list[tuple[float, float]]]:
    """Of every answer under both models, by Transformers at temperature 1."""
    from megatron_async_rlhf.jobs.evaluated_models import load_evaluation

    inputs = load_evaluation(config, {name: out / "served" / name for name in ("policy", "kl_to")})
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (policy, sft)]

    def logprob(model, prompt: list[int], answer: list[int]) -> float:
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            rows = model(ids).logits[0, :-1].log_softmax(-1)
        return rows.gather(-1, ids[0, 1:, None])[len(prompt) - 1 :].sum().item()

    return {
        prompt.index: [
            tuple(logprob(model, prompt.token_ids, answer) for model in models) for answer in token_ids[prompt.index]
        ]
        for prompt in inputs.prompts
    }
