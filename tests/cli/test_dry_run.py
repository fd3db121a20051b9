"""`train --dry-run`: the estimate and the plan, for a model that is not on this machine and without any GPU."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_async_rlhf.config.load import load_config
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.estimate.fitting import advise, run_memory
from megatron_async_rlhf.estimate.generator_memory import GIB
from megatron_async_rlhf.estimate.report import describe, refuse_too_large
from megatron_async_rlhf.jobs.inputs import make_model_template, resolve_architecture
from megatron_async_rlhf.simulate.prediction import shape_of

LLAMA_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
# Torch must not be loaded, which the command itself cannot say.
PROGRAM = """
import sys
from megatron_async_rlhf.cli import app
from megatron_async_rlhf.usage import run_command_line
code = run_command_line(app, sys.argv[1:])
assert "torch" not in sys.modules, "the dry run loads torch"
sys.exit(code)
"""


@pytest.fixture
def root(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(request.config.rootpath)  # where a user of the examples is
    return request.config.rootpath


def dry_run(root: Path, config: Path, *overrides: str, refused: str = "") -> str:
    """What it prints.

    Args:
        refused: a part of the line on standard error, and nothing if the run may start.
    """
    settings = [part for override in overrides for part in ("-s", override)]
    command = [sys.executable, "-c", PROGRAM, "train", str(config), "--dry-run", *settings]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=root)
    assert result.returncode == (2 if refused else 0), result.stdout + result.stderr
    assert refused in result.stderr
    return result.stdout


@pytest.mark.parametrize(
    ("example", "servers", "missing"),
    [
        ("llama8b_async", ["generator"] * 4, ["tokenizer", "weights", "prompts", "prompts"]),
        (
            "llama3.1-8b_no_robots/rlhf",
            ["generator"] * 3 + ["reward"],
            ["tokenizer", "tokenizer", "weights", "weights", "prompts"],
        ),
    ],
)
def test_the_8b_examples_fit_eight_gpus(root: Path, example: str, servers: list[str], missing: list[str]):
    output = dry_run(root, root / "examples" / f"{example}.yaml")
    assert yaml.safe_load(output)["run"]["device"] == "cuda"  # all but the config is a comment
    verdicts = [line for line in output.splitlines() if re.match(r"# (learner|generator|reward\.model): ", line)]
    assert [verdict.endswith(": fits") for verdict in verdicts] == [True] * (2 + ("reward" in servers))
    processes = re.findall(r"^# (learner|generator|reward)\.\d: GPUs", output, re.M)
    assert sorted(processes) == sorted([*servers, *["learner"] * 4])
    lines = re.findall(r"^# not checked, and needed for a start: (\w+)", output, re.M)
    assert lines == missing


def test_of_a_model_without_weights_the_data_is_checked(tmp_path: Path, root: Path):
    """As of one at the hub, of which a dry run downloads the description alone."""
    config = load_config(root / "examples/quickstart.yaml")
    make_model_template(config, tmp_path / "model")
    keys = (f"model={{hf: {tmp_path / 'model'}}}", "warm_start.steps=0", f"run.dir={tmp_path / 'run'}")
    output = dry_run(root, root / "examples/quickstart.yaml", *keys)
    assert "\n# prompts: 8192 to train on, 512 held out\n" in output
    (line,) = [line for line in output.splitlines() if line.startswith("# not checked, ")]
    assert line.startswith("# not checked, and needed for a start: weights: no model.safetensors in model.hf = ")


def test_a_model_that_is_not_there_is_refused_at_a_start(root: Path):
    command = [sys.executable, "-m", "megatron_async_rlhf", "train", "examples/llama8b_async.yaml"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=root)
    assert result.returncode == 2
    assert result.stderr.startswith("error: examples/llama8b holds no model.safetensors")


def test_a_whole_model_is_checked(tmp_path: Path, root: Path):
    """On a CPU, where all processes share the machine's memory."""
    output = dry_run(root, root / "examples" / "quickstart.yaml", f"run.dir={tmp_path / 'run'}")
    assert "not checked" not in output
    assert re.search(r"# prompts: \d+ to train on, 512 held out", output)
    assert re.search(r"# all processes together need [\d.]+ GiB of this machine's [\d.]+ GiB: fits", output)
    assert "# speed, predicted for CPU cores" in output and "known error: " in output


def test_a_70b_model_does_not_fit(tmp_path: Path, root: Path):
    shape = json.loads((root / "examples/llama8b/config.json").read_text()) | LLAMA_70B
    (tmp_path / "config.json").write_text(json.dumps(shape))
    refused = "GiB a GPU, above launch.gpu_memory_gib = 80; try learner.reference = swapped"
    output = dry_run(root, root / "examples" / "llama8b_async.yaml", f"model.hf={tmp_path}", refused=refused)
    assert re.search(r"# learner: the fullest rank needs \d{3}\.\d of 80\.0 GiB .*: does not fit", output)
    assert re.search(r"#   first [a-z_.]+ = ", output)
    assert "that is not enough: divide the model over more GPUs" in output
    assert "its cache holds 0 tokens" in output and "raise generator.gpu_memory_share" in output


def test_long_micro_batches_do_not_fit_and_shorter_ones_do(root: Path):
    overrides = ("learner.micro_batch_tokens=1000000", "schedule.prompts_per_step=1024")
    config = load_config(root / "examples/llama8b_async.yaml", overrides)
    arch, _ = resolve_architecture(config, config.model.hf)
    lines = describe(config, arch)
    (advice,) = advise(config, arch, 80 * GIB)
    assert any("does not fit" in line for line in lines)
    assert f"  first {advice.change}: {advice.needed / GIB:.1f} GiB" in lines
    # Doing what it says gives what it says.
    changed = load_config(root / "examples/llama8b_async.yaml", (*overrides, advice.change.replace(" ", "")))
    assert run_memory(changed, arch).largest_rank == advice.needed <= 80 * GIB


@pytest.mark.parametrize(
    ("overrides", "change"),
    [
        (
            ["learner.ranks=8", "generator.replicas=4", "launch.gpus_per_node=12"],
            "learner.distributed_optimizer = true",
        ),
        (["learner.sequence_parallel=false"], "learner.sequence_parallel = true"),
        ([], "learner.micro_batch_tokens = 3072"),
    ],
)
def test_advice_begins_with_what_costs_least(root: Path, overrides: list[str], change: str):
    config = load_config(root / "examples/llama8b_async.yaml", overrides)
    arch, _ = resolve_architecture(config, config.model.hf)
    room = run_memory(config, arch).largest_rank - 1
    assert advise(config, arch, room)[0].change == change


def test_a_start_is_refused_only_far_above_the_memory(root: Path):
    def check(*overrides: str) -> None:
        config = load_config(root / "examples/llama8b_async.yaml", overrides)
        refuse_too_large(config, resolve_architecture(config, config.model.hf)[0])

    config = load_config(root / "examples/llama8b_async.yaml")
    needed = run_memory(config, resolve_architecture(config, config.model.hf)[0]).largest_rank / GIB
    check(f"launch.gpu_memory_gib={needed / 1.14}")
    too_little = f"launch.gpu_memory_gib={needed / 1.16}"
    with pytest.raises(ConfigError, match=r"estimated to need .* GiB a GPU.*try learner\.micro_batch_tokens = 3072"):
        check(too_little)
    check(too_little, "launch.memory_check=false")


def test_learner_and_generator_on_one_gpu_are_weighed_together(root: Path):
    """The default share of 0.85 alone is no reason to refuse: the generator's cache is what the learner leaves."""

    def check(gib: float) -> None:
        overrides = (
            "weights.transport=ipc", "learner.ranks=1", "learner.tensor_parallel=1", "learner.sequence_parallel=false",
            "generator.replicas=1", f"launch.gpu_memory_gib={gib}",
        )  # fmt: skip
        config = load_config(root / "examples/llama8b_async.yaml", overrides)
        refuse_too_large(config, resolve_architecture(config, config.model.hf)[0])

    check(230)
    with pytest.raises(
        ConfigError, match=r"^learner and generator on one GPU are estimated to need 211.4 GiB.*try learner\."
    ):
        check(180)


def test_a_generator_on_the_learners_gpu_is_started_with_its_planned_cache(tmp_path: Path, root: Path):
    keys = ["run.device=cuda", "weights.transport=ipc", "learner.precision=bf16", "generator.dtype=bfloat16"]
    output = dry_run(root, root / "examples/quickstart.yaml", *keys, f"run.dir={tmp_path / 'run'}")
    (server,) = [line for line in output.splitlines() if line.startswith("# generator.0: GPUs [0]: ")]
    (cache,) = re.findall(r" --kv-cache-memory-bytes (\d+)", server)
    assert (
        f"its cache holds {int(cache) // 1024} tokens" in output
    )  # keys and values of 4 layers, 2 heads of 32, in bf16
    assert "the fullest rank together with the smallest generator needs" in output


def test_train_refuses_what_does_not_fit(tmp_path: Path):
    shape = {"layers": 2, "hidden_size": 64, "ffn_size": 96, "heads": 2, "context_length": 96}
    config = {
        "run": {"device": "cuda", "dir": str(tmp_path / "run")},
        "model": shape,
        "generator": {"max_new_tokens": 12},
        "data": {"train_prompts": 32, "eval_prompts": 8},
        "weights": {"transport": "nccl"},
        "launch": {"gpu_memory_gib": 1},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "megatron_async_rlhf", "train", str(tmp_path / "config.yaml")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2, result.stdout + result.stderr
    (line,) = result.stderr.splitlines()
    assert "above launch.gpu_memory_gib = 1" in line and "launch.memory_check = false" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("example", "overrides", "refused"),
    [
        (
            "llama8b_async",
            ["generator.gpu_memory_share=0.15"],
            "generator: its weights take 15.0 GiB of each GPU, above generator.gpu_memory_share = 0.15 of "
            "launch.gpu_memory_gib = 80; raise generator.tensor_parallel",
        ),
        (
            "llama3.1-8b_no_robots/rlhf",
            ["reward.gpu_memory_share=0.1"],
            "reward: its weights take 14.0 GiB of each GPU, above reward.gpu_memory_share = 0.1",
        ),
        (
            "quickstart",
            ["model.context_length=1000000", "learner.micro_batch_tokens=2000000"],
            "generator: its cache holds 524288 tokens, and no sequence of the longest length with them; raise "
            "generator.kv_cache_gib = 1",
        ),
    ],
)
def test_a_server_without_room_for_one_sequence_is_refused(
    root: Path, example: str, overrides: list[str], refused: str
):
    config = load_config(root / "examples" / f"{example}.yaml", overrides)
    arch = shape_of(config)
    with pytest.raises(ConfigError, match=f"^{re.escape(refused)}"):
        refuse_too_large(config, arch)
    refuse_too_large(
        load_config(root / "examples" / f"{example}.yaml", [*overrides, "launch.memory_check=false"]), arch
    )
