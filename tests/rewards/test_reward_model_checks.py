"""What is wrong with a reward model is one line, in a dry run as before a start, and nothing was started."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save_file
from tiny_reward_model import change_config, describe_reward_model

from megatron_async_rlhf.cli import app
from megatron_async_rlhf.config.load import load_config
from megatron_async_rlhf.config.resume import check_same_run
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.estimate.fitting import run_memory
from megatron_async_rlhf.estimate.generator_memory import GIB
from megatron_async_rlhf.generator.places import places
from megatron_async_rlhf.jobs.inputs import load_run_inputs, make_model_template, resolve_architecture
from megatron_async_rlhf.launch.input_digests import check_same_inputs, digest_inputs, write_input_digests
from megatron_async_rlhf.usage import run_command_line

CONFIG = """
model: {layers: 2, hidden_size: 64, ffn_size: 96, heads: 2, context_length: 96}
generator: {max_new_tokens: 12}
data: {train_prompts: 32, eval_prompts: 8}
reward: {type: reward_model, model: rm}
"""
RM = Path("rm")


def write_weights(**changes: tuple[int, ...] | None) -> None:
    """Zeros of the shapes that the head and one other matrix have; None leaves one out."""
    shapes = {"score.weight": (1, 64), "model.embed_tokens.weight": (260, 64)} | changes
    tensors = {name: numpy.zeros(shape, numpy.float32) for name, shape in shapes.items() if shape is not None}
    save_file(tensors, RM / "model.safetensors")


@pytest.fixture(autouse=True)
def at_work(starts_nothing: None) -> None:
    """In a directory with a reward model."""
    Path("c.yaml").write_text(CONFIG)
    describe_reward_model(RM)
    write_weights()


def shrink_tokens() -> None:
    change_config(RM, vocab_size=200)


WRONG: dict[str, tuple[Callable[[], object], tuple[str, ...], str]] = {
    "nowhere": (lambda: None, ("reward.model=other",), "reward.model = other: no such directory"),
    "no config": (lambda: (RM / "config.json").unlink(), (), "reward.model = rm: no config.json there"),
    "a policy": (
        lambda: change_config(RM, architectures=["LlamaForCausalLM"]),
        (),
        "names LlamaForCausalLM, which gives no score; a reward model is a ...ForSequenceClassification",
    ),
    "two labels": (
        lambda: change_config(RM, id2label={"0": "bad", "1": "good"}),
        (),
        "reward.model = rm: it has 2 labels (num_labels), a reward model has one",
    ),
    "labels not said": (lambda: change_config(RM, id2label=None), (), "it has 2 labels (num_labels)"),
    "no tokenizer": (lambda: (RM / "tokenizer.json").unlink(), (), "reward.model: rm: no tokenizer.json there"),
    "no template": (
        lambda: (RM / "chat_template.jinja").unlink(),
        (),
        "reward.model: rm: no chat template, neither chat_template.jinja",
    ),
    "another's tokenizer": (
        shrink_tokens,
        (),
        "the tokenizer's token '<assistant>' has id 259, the model only 200 embeddings (vocab_size)",
    ),
    "no weights": (lambda: (RM / "model.safetensors").unlink(), (), "reward.model: rm holds no model.safetensors"),
    "no head": (
        lambda: write_weights(**{"score.weight": None}),
        (),
        "reward.model = rm: its weights have no score.weight, which makes a score",
    ),
    "another head": (
        lambda: write_weights(**{"score.weight": (2, 64)}),
        (),
        "reward.model = rm: score.weight has the shape [2, 64], not [1, 64]",
    ),
    "too long a context": (lambda: None, ("reward.context_length=256",), "reward.context_length = 256 is above the 128"),
    "heads": (lambda: None, ("reward.tensor_parallel=4",), "reward.tensor_parallel = 4 does not divide the 2 attention"),
    "prompts do not fit": (
        lambda: None,
        ("reward.context_length=12",),
        "tokens in the chat template of reward.model = rm, which reads 12",
    ),
    "solutions": (
        lambda: None,
        ("reward.center_on_solutions=40",),
        "reward.center_on_solutions = 40: only 32 prompts to train on have a solution",
    ),
    "servers of others": (
        lambda: None,
        ("reward.url=http://host:8000", "reward.replicas=2"),
        "reward.replicas = 2 has no effect with reward.url",
    ),
    "no address": (lambda: None, ("reward.url=host:8000",), "reward.url.0 = host:8000"),
    "of GPUs": (lambda: None, ("reward.gpu_memory_share=0.5",), "reward.gpu_memory_share = 0.5 has no effect with run.device"),
    "template": (
        lambda: None,
        ("reward.chat_template=no.jinja",),
        "reward.model: .: no.jinja cannot be read",
    ),
}  # fmt: skip


@pytest.mark.parametrize("flags", [("--dry-run",), ()], ids=["dry run", "start"])
@pytest.mark.parametrize("what", WRONG)
def test_one_line_and_nothing_started(what: str, flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]):
    if what == "no weights" and flags:
        pytest.skip("a dry run plans with the description alone, see below")
    spoil, settings, expected = WRONG[what]
    spoil()
    arguments = [part for setting in settings for part in ("-s", setting)]
    assert run_command_line(app, ["train", "c.yaml", *flags, *arguments]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
    assert line.startswith("error: ") and expected in line, line


def test_a_dry_run_plans_with_a_description(capsys: pytest.CaptureFixture[str]):
    """Memory follows from the shape, prompts are checked where there is a tokenizer."""
    (RM / "model.safetensors").unlink()
    assert run_command_line(app, ["train", "c.yaml", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    whole = "in reward.model = rm; get the whole model and name its directory"
    assert lines[-1] == f"# not checked, and needed for a start: weights: no model.safetensors {whole}"
    assert "# prompts: 32 to train on, 8 held out" in lines and any(line.startswith("# reward.0: ") for line in lines)
    (RM / "tokenizer.json").unlink()
    assert run_command_line(app, ["train", "c.yaml", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == f"# not checked, and needed for a start: tokenizer: no tokenizer.json {whole}"
    assert "# prompts: not checked" in lines
    arch = resolve_architecture(config(), RM)[0]
    assert arch.num_parameters == 260 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 96 + 2 * 64) + 64 + 64
    (worker,) = run_memory(config(), arch).rewards
    assert worker.weights == 4 * arch.num_parameters


def test_servers_of_others_need_no_weights_here(capsys: pytest.CaptureFixture[str]):
    (RM / "model.safetensors").unlink()
    assert run_command_line(app, ["train", "c.yaml", "--dry-run", "-s", "reward.url=http://host:8000"]) == 0
    assert "reward.0" not in capsys.readouterr().out


def test_a_dry_run_shows_servers_and_memory(capsys: pytest.CaptureFixture[str]):
    assert run_command_line(app, ["train", "c.yaml", "--dry-run", "-s", "reward.replicas=2"]) == 0
    output = capsys.readouterr().out
    for server in ("reward.0", "reward.1"):
        (line,) = [line for line in output.splitlines() if line.startswith(f"# {server}: ")]
        assert "--runner pooling --convert classify" in line and "--max-num-seqs 1 " in line
    assert "# a worker of reward " in output
    assert "# reward.model: its cache holds 256 tokens, 1 sequences of 128" in output


def config(*settings: str) -> RunConfig:
    return load_config(Path("c.yaml"), settings)


def test_memory_of_its_servers_is_counted():
    make_model_template(config(), Path("template"))
    arch, _ = resolve_architecture(config(), Path("template"))
    (worker,) = run_memory(config(), arch).rewards
    assert worker.weights == 4 * (64 + 260 * 64)
    per_token = 4 * 2 * 2 * 2 * 32  # float32 keys and values, 2 layers, 2 heads of 32
    assert (worker.cache, worker.cache_tokens) == (256 * per_token, 256)  # a block for a sequence, one for vLLM
    many = run_memory(config("reward.max_concurrent=100000"), arch).rewards
    assert [each.cache for each in many] == [GIB]
    with_rewards = run_memory(config("reward.replicas=2"), arch).host
    without = run_memory(config("reward.url=http://host:8000"), arch).host
    assert with_rewards - without == 2 * (worker.total + 840 * 2**20)


def test_its_requests_are_counted_among_open_files(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("megatron_async_rlhf.generator.places.open_files", lambda: 1160)
    assert places(config("reward.replicas=2")) == 1000 - 128


def test_a_resumed_run_may_serve_the_same_model_otherwise():
    RM.rename("moved")
    now = config("reward.model=moved", "reward.replicas=2", "reward.request_timeout_s=9", "reward.restarts=1")
    check_same_run(config(), now, contents_are_compared=True)
    with pytest.raises(ConfigError, match="reward.max_concurrent = 8: the run in"):
        check_same_run(config(), config("reward.max_concurrent=8"), contents_are_compared=True)
    several = "reward=[{type: reward_model, model: %s, replicas: %d}, {type: builtin, weight: 0.0}]"
    before, after = config(several % ("rm", 1)), config(several % ("moved", 2))
    check_same_run(before, after, contents_are_compared=True)
    with pytest.raises(ConfigError, match="reward.0.model = moved: the run in"):
        check_same_run(before, after)


def test_a_resumed_run_needs_the_same_weights():
    make_model_template(config(), Path("runs/run/model"))
    Path("runs/run").mkdir(parents=True, exist_ok=True)

    def now():
        return digest_inputs(config(), load_run_inputs(config(), Path("runs/run/model")))

    write_input_digests(Path("runs/run"), now())
    assert check_same_inputs(Path("runs/run"), config(), now()) == []
    data = bytearray((RM / "model.safetensors").read_bytes())
    data[-100] ^= 1
    (RM / "model.safetensors").write_bytes(data)
    with pytest.raises(ConfigError, match="reward.model = rm: the weights are not those that the run in"):
        check_same_inputs(Path("runs/run"), config(), now())
    before = json.loads(Path("runs/run/inputs.json").read_text())
    assert before["reward_models"] is not None
