"""Bad input ends `async-rlhf train` with exit code 2 and one line per problem, before anything is started."""

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from megatron_async_rlhf.cli import app
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.jobs.inputs import make_model_template
from megatron_async_rlhf.models.architecture import architecture_of_hf
from megatron_async_rlhf.models.hf_mapping import hf_shapes
from megatron_async_rlhf.usage import run_command_line

SHAPE = {"layers": 2, "hidden_size": 64, "ffn_size": 96, "heads": 2, "context_length": 96}
BASE = {
    "model": SHAPE,
    "generator": {"max_new_tokens": 12},
    "data": {"train_prompts": 32, "eval_prompts": 8},
}


def train(directory: Path, config: object, *overrides: str, flags: list[str] = []) -> subprocess.CompletedProcess:
    """In this process: to start another takes longer than all that it checks."""
    path = directory / "config.yaml"
    path.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
    settings = [part for override in (f"run.dir={directory / 'run'}", *overrides) for part in ("-s", override)]
    command = ["train", str(path), *settings, *flags]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(directory), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run_command_line(app, command)
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())


def refused(result: subprocess.CompletedProcess) -> str:
    """The one line it was refused with."""
    assert result.returncode == 2, result.stdout + result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["learner.tensor_paralel=2"], "learner.tensor_paralel = 2: no such key"),
        (["schedules.mode=sync"], "no such key"),
        (["schedule.max_staleness=-1"], "schedule.max_staleness = -1"),
        (["schedule.mode=both"], "schedule.mode = both"),
        (["schedule.steps=many"], "schedule.steps = many"),
        (["learner.tensor_parallel=3"], "learner.tensor_parallel = 3 must divide the 2 attention heads"),
        (["generator.tensor_parallel=4"], "generator.tensor_parallel = 4 must divide the 2 attention heads"),
        (["learner.pipeline_parallel=4"], "learner.pipeline_parallel = 4 is above the 2 layers"),
        (["learner.ranks=3", "learner.tensor_parallel=2"], "learner.ranks = 3 is not a multiple"),
        (["learner.sequence_parallel=true"], "learner.tensor_parallel = 1 must be at least 2"),
        (["learner.recompute=layers"], "learner.recompute = layers"),
        (
            ["learner.distributed_optimizer=true"],
            "x context_parallel = 1 x 1 x 1 = 1) = 1 must be at least 2",
        ),
        (["model.heads=3"], "model.hidden_size = 64 must be a multiple of model.heads = 3"),
        (["model.hf=/nowhere"], "model.hf brings shape and tokenizer"),
        (["generator.max_new_tokens=96"], "leaves no room for a prompt"),
        (["data.max_prompt_tokens=90"], "together exceed the context of 96 tokens"),
        (["generator.max_new_tokens=80"], "raise data.max_prompt_tokens, lower generator.max_new_tokens"),
        (["learner.micro_batch_tokens=100"], "must hold a preference pair"),
        (["algorithm.samples_per_prompt=1"], "algorithm.samples_per_prompt = 1"),
        (["reward.type=gsm8k"], "reward.type = gsm8k needs data.train"),
        (["data.train=nowhere.jsonl", "reward.type=gsm8k", "data.solution_field=answer"], "nowhere.jsonl"),
        (["weights.transport=pigeon"], "weights.transport = pigeon"),
        (
            ["weights.transport=nccl"],
            "weights.transport = nccl does not go with run.device = cpu: set weights.transport = gloo",
        ),
        (["weights.timeout_s=400"], "learner.timeout_s = 600 must be at least twice weights.timeout_s = 400"),
        (["model.heads=6", "model.hidden_size=192", "generator.tensor_parallel=3"], "as vLLM pads it: 320 rows"),
        (["generator.temperature=0"], "generator.temperature = 0"),
        (["checkpoint.every_steps=0"], "checkpoint.every_steps = 0"),
        (["checkpoint.keep_last=0"], "checkpoint.keep_last = 0"),
        (["checkpoint.max_run_seconds=-5"], "checkpoint.max_run_seconds = -5"),
        (["checkpoint.timeout_s=0"], "checkpoint.timeout_s = 0"),
        (["checkpoint.keep_best=reward"], "set checkpoint.every_steps and checkpoint.keep_last"),
        (
            ["checkpoint.keep_best=reward", "checkpoint.every_steps=2", "checkpoint.keep_last=null"],
            "set checkpoint.every_steps and checkpoint.keep_last",
        ),
        (["checkpoint.best=lowest"], "checkpoint.best = lowest needs checkpoint.keep_best"),
        (["learner.learning_rate=.nan"], "learner.learning_rate = nan"),
        (["model"], "must look like section.key=value"),
    ],
)
def test_a_bad_value(tmp_path, overrides, message):
    assert message in refused(train(tmp_path, BASE, *overrides))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"prompt": "1+1?", "answer": "#### 2"}', "{broken"], "train.jsonl:2"),
        ([], "no prompts"),
        (['{"task": "1+1?", "answer": "#### 2"}'], "train.jsonl:1"),
        (['{"prompt": "9+9?", "answer": "two"}'], "####"),
    ],
)
def test_a_bad_data_file(tmp_path, lines, message):
    (tmp_path / "train.jsonl").write_text("".join(line + "\n" for line in lines))
    (tmp_path / "eval.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{n}+1?", "answer": f"#### {n + 1}"}) + "\n" for n in range(8))
    )
    data = {"train": "train.jsonl", "eval": "eval.jsonl", "solution_field": "answer", "eval_prompts": 8}
    config = {**BASE, "data": data, "reward": {"type": "gsm8k"}}
    assert message in refused(train(tmp_path, config))


@pytest.mark.parametrize(
    ("text", "message"),
    [("model: [", "not valid YAML"), ("- a\n- b\n", "must hold sections"), ("run: {}\n", "model: missing")],
)
def test_a_bad_file(tmp_path, text, message):
    # Without overrides: they would turn a missing section into an empty one.
    path = tmp_path / "config.yaml"
    path.write_text(text)
    command = [sys.executable, "-m", "megatron_async_rlhf", "train", str(path)]
    assert message in refused(subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "mixtral", "num_local_experts": 8}, "model_type 'mixtral' is a mixture of experts"),
        ({"model_type": "gemma3"}, "model_type 'gemma3' is not supported, only llama, mistral, qwen2, qwen3 are"),
        ({"model_type": "mistral", "max_position_embeddings": 8192}, "sliding_window = 4096 is below"),
        ({"model_type": "qwen2", "rope_scaling": {"type": "yarn"}}, "rope scaling 'yarn' is not supported"),
    ],
)
def test_a_model_that_cannot_be_trained(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert message in refused(train(tmp_path, {**BASE, "model": {"hf": str(tmp_path)}}))


def hugging_face(directory: Path) -> Path:
    """A model of two layers, whole."""
    make_model_template(RunConfig.model_validate(BASE), directory)
    weights = {name: torch.zeros(shape) for name, shape in hf_shapes(architecture_of_hf(directory)).items()}
    save_file(weights, directory / "model.safetensors")
    return directory


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("truncate", "model.safetensors"),
        ("layers", "has no tensor model.layers.2."),
        ("tokenizer", "model.hf = "),
    ],
)
def test_a_damaged_model_is_refused_before_anything_starts(tmp_path, damage, message):
    model = hugging_face(tmp_path / "hf")
    if damage == "truncate":
        weights = model / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    if damage == "layers":
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    if damage == "tokenizer":
        (model / "tokenizer.json").unlink()
    config = BASE | {"model": {"hf": str(model), "context_length": 96}}
    said = refused(train(tmp_path, config))
    assert message in said and str(model) in said


def test_a_missing_config(tmp_path):
    command = [sys.executable, "-m", "megatron_async_rlhf", "train", "nowhere.yaml"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert "nowhere.yaml does not exist" in refused(result)


def test_a_port_in_use(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port {port} is in use" in refused(train(tmp_path, BASE, f"generator.port={port}"))


def test_an_unwritable_run_directory(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    assert "cannot be written" in refused(train(tmp_path, BASE, f"run.dir={blocker / 'run'}"))


def test_a_directory_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.tex").write_text("precious")
    assert "is not a run" in refused(train(tmp_path, BASE))
    assert os.listdir(tmp_path / "run") == ["thesis.tex"]


@pytest.mark.parametrize(
    ("key", "flags"),
    [("model.hf", []), ("model.hf", ["--resume"]), ("model.hf", ["--dry-run"]), ("data.train", [])],
)
def test_a_new_run_that_would_rename_what_it_reads(tmp_path, key, flags):
    """With --resume too, where there is no checkpoint to continue from."""
    final = tmp_path / "run/checkpoints/final"
    final.mkdir(parents=True)
    (tmp_path / "run/config.yaml").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    source = tmp_path / "link/checkpoints/final" / ("" if key == "model.hf" else "prompts.jsonl")
    (tmp_path / "config.yaml").touch()
    before = sorted(tmp_path.rglob("*"))
    inputs = {"model": {"hf": str(source)}}
    if key == "data.train":
        inputs = {"data": {"train": str(source), "solution_field": "answer"}, "reward": {"type": "gsm8k"}}
    line = refused(train(tmp_path, BASE | inputs, flags=flags))
    assert f"{key} = {source} is inside run.dir = {tmp_path / 'run'}" in line and "another run.name" in line
    assert sorted(tmp_path.rglob("*")) == before


def test_a_replay_does_not_take_the_place_of_its_run(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(BASE))
    command = [sys.executable, "-m", "megatron_async_rlhf", "replay", str(run), "--out", str(run)]
    line = refused(subprocess.run(command, capture_output=True, text=True, timeout=60))
    assert f"--out {run} would take the place of {run} itself" in line
    assert list(tmp_path.iterdir()) == [run]


def test_a_dry_run_starts_and_leaves_nothing(tmp_path):
    result = train(tmp_path, BASE, flags=["--dry-run"])
    assert result.returncode == 0, result.stderr
    assert "learner.0" in result.stdout and "generator.0" in result.stdout and "max_staleness: 1" in result.stdout
    assert not (tmp_path / "run").exists()
