"""Every command in the README and the docs runs: as it is printed, with fewer steps, or, where it needs a cluster, as a dry run.

A command that is in no rule fails, and so does a rule that no command needs. docs/tutorial.md and docs/own.md, whose commands
build on each other, have tests of their own.
"""

import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from doc_blocks import PAGES, ROOT, commands, run_shell

from megatron_async_rlhf.data.tokenizer import make_byte_tokenizer

OWN_TESTS = {"docs/tutorial.md": "tests/pipeline/test_tutorial.py", "docs/own.md": "tests/docs/test_own.py"}
LIMIT_S = 240
FEWER = (
    "schedule.steps=4", "schedule.prompts_per_step=8", "warm_start.steps=8", "data.train_prompts=64", "data.eval_prompts=8",
)  # fmt: skip
# What stands for names in the docs.
STAND_INS = (
    ("CONFIG", "examples/quickstart.yaml"),
    ("path/to/gsm8k/train.jsonl", "gsm8k.jsonl"),
    ("path/to/SmolLM2-135M-Instruct", "models/tiny"),
    ("path/to/model", "models/tiny"),
    ("sft.model.hf=...", "sft.model.hf=models/described"), ("...", ""),
    ("$gold", "data/rm"),
    ("/data/Llama-3.1-8B", "models/described"), ("meta-llama/Llama-3.1-8B", "models/described"),
    ("meta-llama/Llama-3.2-1B", "examples/llama1b"), ("realtreetune/rho-1b-sft-GSM8K", "examples/rho1b"),
)  # fmt: skip


def as_printed(words: list[str]) -> list[str]:
    return words


def fewer(*keys: str) -> Callable[[list[str]], list[str]]:
    """With fewer steps and prompts than it has by itself."""
    return lambda words: [*words, *(part for key in (*FEWER, *keys) for part in ("-s", key))]


def with_fewer_prompts(words: list[str]) -> list[str]:
    return [*words, "-s", "schedule.prompts_per_step=32"]


def dry(words: list[str]) -> list[str]:
    """What it would do."""
    words = ["bash", *(word for word in words[1:] if not word.startswith("--nodes"))] if words[0] == "sbatch" else words
    return words if "--dry-run" in words else [*words, "--dry-run"]


def help_of(words: list[str]) -> list[str]:
    """Whether there is such a command with such options."""
    return [*words, "--help"]


def of_the_export(words: list[str]) -> list[str]:
    """With a checkpoint that has the weights of what the command before has exported."""
    return ["bash", "-c", f"async-rlhf import-hf exported/policy checkpoints/policy && {shlex.join(words)}"]


def after_sft(words: list[str]) -> list[str]:
    """With the policy that another page makes."""
    sft = fewer()(["async-rlhf", "sft", "examples/quickstart.yaml", "-s", "run.name=sft"])
    return ["bash", "-c", f"{shlex.join(sft)} && {shlex.join(words)}"]


class Elsewhere(str):
    """The test that runs it, or what a machine must have for it."""


NEEDS_DOCKER = Elsewhere("a Docker daemon, and enroot")
NEEDS_GPU = Elsewhere("a GPU")
SLURM = Elsewhere("tests/cluster/test_slurm_testbed.py")
LAUNCH = Elsewhere("tests/cluster/test_nemo_run_page.py")

RULES: list[tuple[str, Callable[[list[str]], list[str]] | Elsewhere]] = [
    (r"bash tools/test\.sh", Elsewhere("this test is part of it")),
    (r"bash tools/quickstart\.sh|tools/setup_env\.sh|source \.venv/bin/activate", Elsewhere("tests/docs/test_shell_blocks.py")),
    (r"python -m pytest .*", Elsewhere("this test is part of it")),
    # Training
    (r".*train examples/quickstart\.yaml -s run\.name=sync .*", fewer()),
    (r".*train examples/quickstart\.yaml -s run\.name=tp2 .*", fewer()),
    (r"async-rlhf train examples/quickstart\.yaml -s schedule\.(steps=5|max_staleness=1)", dry),
    (r".*train examples/gsm8k_tiny\.yaml .*", fewer("data.eval_prompts=4", "generator.max_new_tokens=32", "model.vocab_size=400")),
    (r"async-rlhf train config\.yaml .*", fewer("run.name=saved", "checkpoint.every_steps=2")),
    (r"async-rlhf sft examples/quickstart\.yaml .*", fewer()),
    (r"async-rlhf train examples/quickstart\.yaml -s warm_start\.steps=0 .*", fewer("warm_start.steps=0", "run.name=after_sft")),
    (r"async-rlhf train CONFIG .*", dry),
    (r"async-rlhf train examples/quickstart\.yaml -s run\.device=cuda .*", dry),
    (r"async-rlhf train planned\.yaml --dry-run", as_printed),
    (r".*init run\.yaml .*", as_printed),
    # Questions to runs
    (r".*eval runs/quickstart( -s eval\.against=references)?", as_printed),
    (r"async-rlhf eval runs/quickstart -s eval\.against=runs/sft .*", after_sft),
    (r"async-rlhf eval examples/gsm8k_tiny\.yaml .*", lambda words: dry([*words, "-s", "data.eval_prompts=20"])),
    (r"async-rlhf (watch|report) .*", as_printed),
    (r".*(import-hf|export-hf) .*", as_printed),
    (r".*verify-weights .*", of_the_export),
    (r"async-rlhf verify-checkpoint runs/quickstart", as_printed),
    # Plans and comparisons
    (r"async-rlhf plan examples/llama8b_async\.yaml.*", with_fewer_prompts),
    (r"async-rlhf plan examples/quickstart\.yaml --measure .*", help_of),
    (r".*compare examples/.*", dry),
    (r"async-rlhf compare runs/a .*", Elsewhere("tests/compare/test_compare_command.py")),
    (r".*tools/bench_vs_trl\.py .*", help_of),
    (r"async-rlhf sweep examples/sweep\.yaml --dry-run", as_printed),
    (r"async-rlhf sweep examples/sweep\.yaml( --only .*| --report-only)?", Elsewhere("tests/e2e/test_sweep.py")),
    # Recipes
    (r"async-rlhf pipeline examples/mini", Elsewhere("tests/pipeline/test_mini_recipe.py")),
    (r"async-rlhf pipeline examples/smollm2 .*", Elsewhere("tests/pipeline/test_pipeline_dry_run.py")),
    (r"async-rlhf pipeline examples/.*", dry),
    (r"gold=.*", Elsewhere("a variable of the next command")),
    (r"python examples/smollm2/(prepare|solution_pairs)\.py .*", help_of),
    (r"async-rlhf reward-model examples/solution_reward_model\.yaml .*", help_of),
    # Clusters
    (r"sbatch slurm/cpu_smoke\.sh", SLURM),
    (r"bash slurm/llama8b_async\.sh --nodes=4 --dry-run", as_printed),
    (r"sbatch (--nodes=4 )?slurm/llama8b_(async|pipeline)\.sh.*", dry),
    (r"(docker|enroot|SLURM_CONTAINER=).*", NEEDS_DOCKER),
    (r"bash tools/setup_launch_env\.sh|source \.venv-launch/bin/activate", LAUNCH),
    (r"async-rlhf launch .*|nemo .*", LAUNCH),
    # Machines with GPUs, other packages
    (r"pip install .*", NEEDS_GPU),
    (r"async-rlhf doctor", as_printed),
    (r"python tools/gpu_check\.py.*", Elsewhere("tests/tools/test_gpu_check.py")),
    (r"vllm serve .*|lm_eval .*", NEEDS_GPU),
]  # fmt: skip


# Runs of a minute whose parts other commands show.
THOROUGH = (
    r"async-rlhf eval runs/quickstart( -s eval\.against=runs/sft .*)?",
    r"async-rlhf train examples/quickstart\.yaml -s run\.name=tp2 .*",
    r"async-rlhf train .* -s warm_start\.steps=0 .*",
    r"async-rlhf train examples/gsm8k_tiny\.yaml .*",
    r"async-rlhf train config\.yaml .*",
)


def every_command() -> list[tuple[str, list[str]]]:
    return [(page, words) for page in PAGES if page not in OWN_TESTS for words in commands(page)]


def every_command_once() -> Iterator[pytest.param]:
    """Some are on several pages."""
    met: set[str] = set()
    for page, words in every_command():
        text = " ".join(words).removeprefix(".venv/bin/")
        if text not in met:
            met.add(text)
            thorough = any(re.fullmatch(pattern, text) for pattern in THOROUGH)
            yield pytest.param(page, words, marks=[pytest.mark.thorough] if thorough else [])


def rule_of(words: list[str]) -> Callable[[list[str]], list[str]] | Elsewhere | None:
    text = " ".join(words).removeprefix(".venv/bin/")
    return next((rule for pattern, rule in RULES if re.fullmatch(pattern, text)), None)


def test_every_command_has_a_rule_and_every_rule_a_command():
    texts = [" ".join(words).removeprefix(".venv/bin/") for _, words in every_command()]
    assert [text for text in texts if not any(re.fullmatch(pattern, text) for pattern, _ in RULES)] == []
    assert [pattern for pattern, _ in RULES if not any(re.fullmatch(pattern, text) for text in texts)] == []
    named = [rule for _, rule in RULES if isinstance(rule, Elsewhere) and rule.startswith("tests/")]
    assert [path for path in [*named, *OWN_TESTS.values()] if not (ROOT / path).is_file()] == []


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory like the repository's, where what commands read is there and what they write does no harm."""
    directory = tmp_path_factory.mktemp("docs")
    for name in ("examples", "slurm", "tools", "docs"):
        (directory / name).symlink_to(ROOT / name)
    make_inputs(directory)
    keys = [part for key in (*FEWER, "schedule.record=true", "checkpoint.every_steps=2") for part in ("-s", key)]
    run_shell(shlex.join(["async-rlhf", "train", "examples/quickstart.yaml", *keys]), directory, LIMIT_S)
    return directory


def make_inputs(directory: Path) -> None:
    rows = [{"question": f"{n} + {n}?", "answer": f"Twice {n}.\n#### {2 * n}"} for n in range(100)]
    chats = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "Yes."}]}
        for n in range(100)
    ]
    pairs = [{"prompt": f"{n}?", "chosen": "Yes.", "rejected": "No."} for n in range(100)]
    (directory / "data").mkdir()
    for name, records in {
        "gsm8k.jsonl": rows, "test.jsonl": rows[:20], "chats.jsonl": chats, "data/no_robots.jsonl": chats, "data/no_robots_train.jsonl": chats,
        "data/pairs.jsonl": pairs, "data/ultrafeedback_binarized.jsonl": pairs,
    }.items():  # fmt: skip
        (directory / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
    tokens = {"vocab_size": 260, "bos_token_id": None, "eos_token_id": 257, "pad_token_id": 256}
    config = LlamaConfig(**shape, **tokens, num_key_value_heads=4, max_position_embeddings=512)
    LlamaForCausalLM(config).save_pretrained(directory / "models/tiny")
    make_byte_tokenizer(directory / "models/tiny")
    shutil.copytree(directory / "models/tiny", directory / "models/Llama-3.1-8B")
    (directory / "models/described").mkdir()
    shutil.copy(ROOT / "examples/llama8b/config.json", directory / "models/described")
    shutil.copytree(directory / "models/tiny", directory / "models/rho-1b")
    for name, example in {
        "sft": "llama8b", "sft-policy": "llama8b", "rm": "llama8b_reward_model", "reward-model": "llama8b_reward_model",
    }.items():  # fmt: skip
        shutil.copytree(ROOT / "examples" / example, directory / "data" / name)
    (directory / ".venv").symlink_to(sys.prefix)
    (directory / "config.yaml").symlink_to(ROOT / "examples/quickstart.yaml")


def stood_in(word: str) -> str:
    for name, stand_in in STAND_INS:
        word = word.replace(name, stand_in)
    return word.replace("/data/", "data/")


@pytest.mark.slow
@pytest.mark.timeout(LIMIT_S + 60)
@pytest.mark.parametrize(
    ("page", "words"),
    list(every_command_once()),
    ids=lambda value: value if isinstance(value, str) else " ".join(value)[:60],
)
def test_a_command(place: Path, page: str, words: list[str]):
    rule = rule_of(words)
    if isinstance(rule, Elsewhere):
        pytest.skip(f"not here: {rule}")
    assert rule is not None
    words = [stood_in(word) for word in rule([words[0].removeprefix(".venv/bin/"), *words[1:]])]
    run_shell(shlex.join(word for word in words if word), place, LIMIT_S)


@pytest.mark.slow
def test_the_quickstart_script_sets_up_and_starts(tmp_path: Path):
    if Path(sys.prefix) != ROOT / os.environ.get("ASYNC_RLHF_VENV", ".venv"):
        pytest.skip("the tests run in an environment that tools/setup_env.sh has not made")
    said = run_shell(f"bash {ROOT}/tools/quickstart.sh --dry-run -s run.dir={tmp_path}/run", tmp_path, LIMIT_S)
    assert "done: async-rlhf train ended with exit code 0" in said
