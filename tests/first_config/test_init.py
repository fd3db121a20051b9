"""`async-rlhf init`: what it writes for models and data of several forms, and that the checks of a run accept it."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_async_rlhf.cli import app
from megatron_async_rlhf.config.load import load_config, read_tree
from megatron_async_rlhf.data.tokenizer import make_byte_tokenizer
from megatron_async_rlhf.errors import WriteError
from megatron_async_rlhf.models.layout_rules import check_layouts
from megatron_async_rlhf.simulate.prediction import shape_of

QUESTIONS = [f"What is {n} plus {n}?" for n in range(40)]
SHAPE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 260, "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "eos_token_id": 257,
}  # fmt: skip
LARGE = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "max_position_embeddings": 8192,
}  # fmt: skip


@pytest.fixture(autouse=True)
def empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make_model(**changes) -> None:
    Path("base").mkdir()
    make_byte_tokenizer("base")
    Path("base/config.json").write_text(json.dumps(SHAPE | changes))


def make_data(records) -> None:
    Path("data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def run_init(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["init", "run.yaml", "--model", "base", "--data", "data.jsonl", *arguments])
    return result.exit_code, str(result.exception or result.output)


def written(records, *arguments: str):
    make_model()
    make_data(records)
    code, said = run_init("--gpus", "0", *arguments)
    assert code == 0, said
    return load_config(Path("run.yaml"))


SOLVED = {
    "gsm8k": [{"question": q, "answer": f"Twice {n}.\n#### {2 * n}"} for n, q in enumerate(QUESTIONS)],
    "math": [{"problem": q, "solution": f"It is \\boxed{{{2 * n}}}."} for n, q in enumerate(QUESTIONS)],
    "ifeval": [{"prompt": q, "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]} for q in QUESTIONS],
}


@pytest.mark.parametrize("reward", SOLVED)
def test_the_reward_is_what_the_data_suggest(reward):
    config = written(SOLVED[reward])
    assert config.reward.type == reward
    assert not Path("reward.py").exists()


def test_without_one_a_function_is_written_that_gets_all_columns():
    records = [{"prompt": q, "topic": "sums", "difficulty": n % 3} for n, q in enumerate(QUESTIONS)]
    config = written(records)
    assert config.reward.function == "reward.py:score"
    assert config.data.reference_fields == ["topic", "difficulty"]
    scope: dict = {}
    exec(Path("reward.py").read_text(), scope)
    better, worse = scope["score"]("?", ["Yes.", "Yes" * 100], topic="sums", difficulty=1)
    assert better > worse


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]


def test_columns_that_no_function_can_take_are_left_out():
    """Data like No Robots has the prompt twice; names may be Python's own words; some records lack a column."""
    records = [{"messages": CHAT, "prompt": q, "class": "a", "a b": 1, "topic": "t"} for q in QUESTIONS]
    records[3]["rare"] = "r"
    config = written(records)
    assert config.data.reference_fields == ["topic"]
    scope: dict = {}
    exec(Path("reward.py").read_text(), scope)
    assert len(scope["score"]("?", ["Yes."], topic="t")) == 1


def test_a_file_that_cannot_be_written_is_one_line():
    make_model()
    make_data(SOLVED["gsm8k"])
    command = ["init", "nowhere/run.yaml", "--model", "base", "--data", "data.jsonl", "--gpus", "0"]
    result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, WriteError) and "nowhere/run.yaml cannot be written" in str(result.exception)


def test_a_function_of_ones_own_is_given_the_columns_it_asks_for():
    Path("own.py").write_text("def score(completions, topic):\n    return [float(topic in c) for c in completions]\n")
    records = [{"prompt": q, "topic": "sums", "difficulty": 1} for q in QUESTIONS]
    config = written(records, "--reward", "own.py:score")
    assert config.reward.function == "own.py:score"
    assert config.data.reference_fields == ["topic"]


def test_lengths_come_from_the_data():
    config = written([{"prompt": "a" * 100, "completion": "b" * 50}] * 39 + [{"prompt": "a" * 400, "completion": "b"}])
    assert 100 < config.data.max_prompt_tokens <= 160, "a single long prompt does not make the context longer"
    assert config.data.long_prompts == "drop"
    assert config.generator.max_new_tokens == 64
    assert config.model.context_length == config.data.max_prompt_tokens + 64


@pytest.mark.parametrize("gpus", ["0", "1", pytest.param("8", marks=pytest.mark.thorough)])
def test_a_pair_of_the_longest_sequences_fits_a_micro_batch(gpus):
    make_model(max_position_embeddings=16384, num_attention_heads=2)
    make_data([{"prompt": "a" * 5000, "completion": "b" * 1000}] * 40)
    code, said = run_init("--gpus", gpus)
    assert code == 0, said
    config = load_config(Path("run.yaml"))
    assert config.model.context_length > 5000
    check_layouts(config, shape_of(config))


def test_records_that_cannot_be_used_are_left_out():
    config = written([*SOLVED["gsm8k"], {"question": "", "answer": "#### 1"}])
    assert config.data.bad_records == "drop"
    assert "1 of 41 records cannot be used" in Path("run.yaml").read_text()


def test_every_key_has_a_comment_or_a_name_that_says_it_all():
    written(SOLVED["gsm8k"])
    lines = Path("run.yaml").read_text().splitlines()
    assert max(map(len, lines)) <= 120
    assert sum("#" in line for line in lines) > 25
    assert list(read_tree(Path("run.yaml")))[:3] == ["run", "model", "data"]


def test_one_gpu_is_shared():
    make_model()
    make_data([{"prompt": q} for q in QUESTIONS])
    code, said = run_init("--gpus", "1")
    assert code == 0, said
    config = load_config(Path("run.yaml"))
    assert (config.weights.transport, config.gpus) == ("ipc", 1)
    assert "share the one GPU" in Path("run.yaml").read_text()


def test_on_gpus_the_planner_divides_them():
    make_model(**LARGE)
    make_data(SOLVED["gsm8k"])
    code, said = run_init("--gpus", "8")
    assert code == 0, said
    config = load_config(Path("run.yaml"))
    assert config.run.device == "cuda" and config.learner.precision == "bf16" and config.weights.transport == "nccl"
    assert 2 < config.gpus <= 8
    assert "a step are predicted" in Path("run.yaml").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--reward", "gsm8"), "--reward gsm8: no reward is called so, and there is no such directory; did you mean gsm8k?"),
        (("--reward", "judge"), "--reward judge has keys of its own"),
        (("--reward", "own.py:score"), "own.py"),
    ],
)  # fmt: skip
def test_a_reward_that_does_not_exist_is_refused(arguments, said):
    make_model()
    make_data(SOLVED["gsm8k"])
    code, message = run_init("--gpus", "0", *arguments)
    assert code != 0 and said in message and "\n" not in message.strip()
    assert not Path("run.yaml").exists()


def test_nothing_is_overwritten():
    make_model()
    make_data([{"prompt": q} for q in QUESTIONS])
    Path("reward.py").write_text("mine\n")
    code, message = run_init("--gpus", "0")
    assert code != 0 and "reward.py is there already" in message
    assert not Path("run.yaml").exists() and Path("reward.py").read_text() == "mine\n"
    assert run_init("--gpus", "0", "--force")[0] == 0
    assert run_init("--gpus", "0")[1].startswith("run.yaml is there already")
