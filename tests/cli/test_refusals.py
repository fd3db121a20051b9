"""What people get wrong in a configuration, an override, a command line or a data file, and the one line they are told."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_async_rlhf.cli import app
from megatron_async_rlhf.usage import run_command_line

MODEL = (
    "model: {layers: 2, hidden_size: 64, ffn_size: 96, heads: 2, context_length: 96}\ngenerator: {max_new_tokens: 12}\n"
)
BUILTIN = MODEL + "data: {train_prompts: 32, eval_prompts: 8}\n"
OWN = MODEL + "data: {train: t.jsonl, solution_field: answer, eval_prompts: 1}\nreward: {type: gsm8k}\n"
ROW = '{"prompt": "1 + 1?", "answer": "#### 2"}\n'

# Words of pydantic's, Python's and YAML's that say nothing to who reads them.
JARGON = re.compile(
    r"valid dictionary|instance of|Keys\b|Section\b|Input should|Value error|NoneType|\[type=|For further information|"
    r"tag:yaml|<class|Traceback|extra_forbidden|\bTrue\b|\bFalse\b"
)


pytestmark = pytest.mark.usefixtures("starts_nothing")


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command line, which must be refused, and returns the line."""

    def told(*arguments: str) -> str:
        assert run_command_line(app, arguments) == 2
        output = capsys.readouterr().err
        assert output.endswith("\n") and output.count("\n") == 1, output
        line = output.removeprefix("error: ").strip()
        assert output == f"error: {line}\n"
        assert not JARGON.search(line), line
        # No part of a key before itself: `schedule: schedule.steps`, `override 'a': override`.
        assert not re.search(r"\b([\w.]+): \1\b", line), line
        return line

    return told


OVERRIDES = [
    # override, what the line must name: key, value, rule
    ("learner.lr=1", ["learner.lr = 1: no such key", "did you mean learner.learning_rate?"]),
    ("learner.learning_rat=1", ["did you mean learner.learning_rate?"]),
    ("schedule.step=5", ["schedule.step = 5", "did you mean schedule.steps?"]),
    ("schedule.max-staleness=1", ["did you mean schedule.max_staleness?"]),
    ("lerner.ranks=2", ["did you mean learner?"]),
    ("Learner.ranks=2", ["did you mean learner?"]),
    ("learner.temperature=1", ["did you mean generator.temperature or "]),
    ("learner.tp=2", ["did you mean learner.tensor_parallel?"]),
    ("learner.xyzzy=2", ["learner.xyzzy = 2: no such key", "known here: learning_rate,"]),
    ("algorithm.gamma=0.9", ["algorithm.gamma = 0.9", "it goes with algorithm.type = ppo, not online_dpo"]),
    ("algorithm.type=pppo", ["algorithm.type = pppo", "did you mean ppo?"]),
    ("algorithm=ppo", ["algorithm = ppo", "'algorithm={type: ppo}'"]),
    ("algorithm={type:ppo}", ["type:ppo", "space after the colon", "type: ppo"]),
    (
        "algorithm={type: ppo, kl: 0.1}",
        ["algorithm.kl = 0.1", "must be a section", "algorithm.kl: {coefficient: 0.05}"],
    ),
    ("telemetry.wandb=true", ["telemetry.wandb = true", "telemetry.wandb: {project: megatron-async-rlhf}", "null"]),
    ("learner.fp8=true", ["learner.fp8 = true", "learner.fp8: {recipe: tensorwise}"]),
    ("reward=gsm8k", ["reward = gsm8k", "-s 'reward={type: gsm8k}'"]),
    ("schedule=sync", ["schedule = sync", "-s schedule.mode=sync"]),
    ("learner=[]", ["learner = []", "must be a section"]),
    ("schedule.mode=asinc", ["schedule.mode = asinc", "'sync' or 'async'", "did you mean async?"]),
    ("launch.gpu=H100s", ["launch.gpu = H100s", "did you mean h100?"]),
    ("generator.dtype=fp16", ["generator.dtype = fp16", "'float32' or 'bfloat16'"]),
    ("learner.precision=half", ["learner.precision = half", "'fp32' or 'bf16'"]),
    ("schedule.steps=many", ["schedule.steps = many", "whole number"]),
    ("schedule.steps=1,000", ["schedule.steps = 1,000", "write 1000"]),
    ("schedule.steps=2.5", ["schedule.steps = 2.5", "whole number"]),
    ("schedule.steps=010", ["schedule.steps = 010", "octal", "10 or 8"]),
    ("schedule.steps=1:30", ["schedule.steps = 1:30", "base 60"]),
    ("schedule.steps=-1", ["schedule.steps = -1", "greater than 0"]),
    ("schedule.steps=", ["schedule.steps = null", "whole number"]),
    ("schedule.max_staleness=None", ["schedule.max_staleness = None", "or null"]),
    ("schedule.epochs=2", ["schedule.max_staleness = 1", "not a multiple of mini_batches x epochs = 2"]),
    ("learner.min_learning_rate=1", ["learner.min_learning_rate = 1.0 is above learning_rate"]),
    ("learner.learning_rate=5%", ["learner.learning_rate = 5%", "must be a number", "write 0.05"]),
    ("learner.timeout_s=10m", ["learner.timeout_s = 10m", "write 600"]),
    ("weights.staging_mib=64MiB", ["weights.staging_mib = 64MiB", "write 64"]),
    ("generator.kv_cache_gib=4GB", ["generator.kv_cache_gib = 4GB", "write 4"]),
    ("checkpoint.max_run_seconds=1h", ["checkpoint.max_run_seconds = 1h", "write 3600"]),
    ("launch.gpu_memory_gib=80 GiB", ["launch.gpu_memory_gib = 80 GiB", "write 80"]),
    ("learner.micro_batch_tokens=4k", ["learner.micro_batch_tokens = 4k", "write 4000"]),
    ("generator.gpu_memory_share=85", ["generator.gpu_memory_share = 85", "less than 1"]),
    ("generator.temperature=0", ["generator.temperature = 0", "greater than 0"]),
    ("generator.temperature=hot", ["generator.temperature = hot", "must be a number"]),
    ("learner.learning_rate=1e-5e", ["learner.learning_rate = 1e-5e", "must be a number"]),
    ("learner.learning_rate=-1e-5", ["learner.learning_rate = -1e-05", "greater than 0"]),
    ("learner.learning_rate=1 e-5", ["learner.learning_rate = 1 e-5", "must be a number"]),
    ("learner.learning_rate='1e-5", ["a quote is opened and not closed"]),
    ("learner.ranks=2 generator.replicas=2", ["learner.ranks = 2 generator.replicas=2", "a -s of its own"]),
    ("learner.tensor_parallel=3", ["tensor_parallel"]),
    ("generator.max_new_tokens=200", ["generator.max_new_tokens = 200"]),
    ("model.hf=nowhere", ["model.hf"]),
    ("model={hf: nowhere}", ["model.hf = nowhere"]),
    ("model.chat_template=none.jinja", ["model.chat_template = none.jinja"]),
    ("reward={type: function, function: none.py:score}", ["none.py"]),
    ("reward={type: function, function: score}", ["score", "FILE.py:NAME"]),
    ("reward={type: reward_model, model: nowhere}", ["nowhere"]),
    ("run.device=cuda:0", ["run.device = cuda:0", "cuda"]),
    ("weights.transport=NCCL", ["weights.transport"]),
    ("schedule.in_flight_updates=yes", ["schedule.in_flight_updates"]),
    ("algorithm.beta=.1.", ["algorithm.beta = .1.", "must be a number"]),
    ("algorithm.samples_per_prompt=1", ["algorithm.samples_per_prompt = 1"]),
    ("learner.learning_rate=.inf", ["learner.learning_rate = inf", "finite"]),
    ("checkpoint.every_steps=true", ["checkpoint.every_steps = true", "not true or false"]),
    ("launch.pin_cores=maybe", ["launch.pin_cores = maybe", "true or false"]),
    ("telemetry.wandb.tags=a", ["telemetry.wandb.tags = a", "list"]),
    ("launch.slurm.sbatch={a: [1]}", ["launch.slurm.sbatch.a = [1]", "text, a number"]),
    ("launch.slurm={tunnel: ssh}", ["launch.slurm.tunnel = ssh needs launch.slurm.host"]),
    ("run.name=null", ["run.name = null", "must be text"]),
    ("run.name=a/b", ["run.name = a/b"]),
    ("run.dir=${HOME}/x", ["run.dir = ${HOME}/x", "${HOME} is not filled in"]),
    ("model.hf=$MODELS/x", ["$MODELS is not filled in"]),
    ("run.name=a #b", ["'#b'", "comment", "quotes"]),
    ("run.name={", ["'run.name={'", "not valid YAML"]),
    ("run.seed.deep=5", ["run.seed = {deep: 5}", "whole number"]),
    ("data.prompt_field=@id", ["'data.prompt_field=@id'", "quotes"]),
    ("data.train=*.jsonl", ["'data.train=*.jsonl'", "quotes"]),
    ("data.train=nowhere.jsonl", ["data.train = nowhere.jsonl", "no such file", "reward.type"]),
    ("reward.type=gsm8k", ["reward.type = gsm8k needs data.train with solutions"]),
    ("+learner.ranks=2", ["'+learner.ranks=2'", "-s learner.ranks=2"]),
    ("++learner.ranks=2", ["-s learner.ranks=2"]),
    ("--learner.ranks=2", ["-s learner.ranks=2"]),
    ("~learner.fp8", ["-s learner.fp8=null"]),
    ("learner.ranks:2", ["-s learner.ranks=2"]),
    ("learner.ranks: 2", ["-s learner.ranks=2"]),
    ("learner.ranks 2", ["-s learner.ranks=2"]),
    ("learner.ranks", ["'learner.ranks'", "section.key=value"]),
]


@pytest.mark.parametrize(("override", "named"), OVERRIDES, ids=[override for override, _ in OVERRIDES])
def test_an_override(told, override: str, named: list[str]):
    Path("c.yaml").write_text(BUILTIN)
    line = told("train", "c.yaml", "-s", override)
    assert [part for part in named if part not in line] == [], line


def test_a_metric_that_no_step_has_is_refused_before_the_start(told):
    Path("c.yaml").write_text(BUILTIN + "checkpoint: {every_steps: 2, keep_best: rewards}\n")
    assert "checkpoint.keep_best = rewards" in (line := told("train", "c.yaml")) and "did you mean reward?" in line
    line = told("train", "c.yaml", "-s", "algorithm={type: ppo}", "-s", "checkpoint.keep_best=dpo/margin")
    assert "checkpoint.keep_best = dpo/margin" in line and "value_loss" in line


COMMAND_LINES = [
    (["train", "c.yaml", "learner.ranks=2"], ["unexpected argument learner.ranks=2", "-s learner.ranks=2"]),
    (["train", "c.yaml", "+learner.ranks=2", "run.seed=1"], ["-s learner.ranks=2 -s run.seed=1"]),
    (["train", "c.yaml", "~learner.fp8"], ["-s learner.fp8=null"]),
    (["train", "c.yaml", "--learner.ranks=2"], ["no option --learner.ranks", "-s learner.ranks=2"]),
    (["train", "c.yaml", "--learner.ranks", "2"], ["-s learner.ranks=2"]),
    (["train", "c.yaml", "--steps=5"], ["no option --steps", "-s schedule.steps=5"]),
    (["import-hf", "a", "b", "--tensor_parallel", "2"], ["did you mean --tensor-parallel?"]),
    (["import-hf", "a", "b", "--device", "cuda"], ["no option --device", "import-hf --help"]),
    (["import-hf", "a", "b", "learner.ranks=2"], ["unexpected argument learner.ranks=2", "import-hf --help"]),
    (["train", "c.yaml", "--resum"], ["no option --resum", "did you mean --resume?"]),
    (["train", "c.yaml", "b.yaml"], ["unexpected argument b.yaml", "train --help"]),
    (["train", "c.yaml", "-s"], ["-s", "--help"]),
    (
        ["train", "c.yaml", "-s", "reward={type:", "gsm8k}"],
        ["quotes, -s 'reward={type: gsm8k}'"],
    ),  # no quotes in the shell
    (["train", "c.yaml", "-s", "learner.ranks", "=", "2"], ["no spaces around its =", "-s section.key=value"]),
    (["train", "c.yaml", "-s", "learner.ranks=", "2"], ["no spaces around its ="]),
    (["train", "c.yaml", "-slearner.rank=2"], ["did you mean learner.ranks?"]),
    (["train", "-s", "learner.ranks=2"], ["missing argument"]),
    (["compare", "c.yaml", "--seed", "0,1"], ["did you mean --seeds?"]),
    (["compare", "c.yaml", "--seeds", "0 1"], ["--seeds"]),
    (["plan", "c.yaml", "--gpu", "rtx4090"], ["rtx4090"]),
    (["report", "runs/none"], ["runs/none"]),
    (["watch", "runs/none"], ["runs/none"]),
    (["eval", "runs/none"], ["runs/none"]),
    (["export-hf", "c.yaml", "out"], ["c.yaml"]),
    (["verify-weights", "none", "nowhere"], ["none"]),
    (["init", "c.yaml", "--model", "none", "--data", "t.jsonl"], ["c.yaml is there already"]),
    (["init", "d.yaml", "--model", "none", "--data", "t.jsonl"], ["none"]),
    (["train"], ["missing argument", "train --help"]),
    (["train", "learner.ranks=2"], ["learner.ranks=2 does not exist", "-s learner.ranks=2"]),
    (["train", "none.yaml"], ["none.yaml does not exist"]),
    (["train", "."], ["directory without config.yaml"]),
    (["trian", "c.yaml"], ["no command trian", "did you mean train?"]),
    (["export", "a", "b"], ["no command export", "did you mean export-hf?"]),
    (["xyzzy"], ["no command xyzzy", "train, "]),
    (["sft", "c.yaml"], ["warm_start.steps = 0", "sft: {epochs: 1}"]),
    (["sweep", "c.yaml"], ["sweep: missing", "examples/sweep.yaml"]),
    (["sweep", "c.yaml", "--max-seconds", "soon"], ["--max-seconds", "must be a number"]),
    (["replay", "c.yaml"], ["c.yaml is no run's directory"]),
    (["launch", "c.yaml", "--executor", "slrum"], ["--executor", "did you mean slurm?"]),
    (["import-hf", "a", "b", "--dtype", "bf16"], ["--dtype", "did you mean bfloat16?"]),
    (["import-hf", "a", "b", "--tensor-parallel", "0"], ["--tensor-parallel", "greater than or equal to 1"]),
]


@pytest.mark.parametrize(("arguments", "named"), COMMAND_LINES, ids=[" ".join(line) for line, _ in COMMAND_LINES])
def test_a_command_line(told, arguments: list[str], named: list[str]):
    Path("c.yaml").write_text(BUILTIN)
    line = told(*arguments)
    assert [part for part in named if part not in line] == [], line


FILES = [
    ("learner: {ranks: 1}\n" + BUILTIN + "learner: {threads: 2}\n", ["line 5", "learner is there a second time, after line 1"]),
    (BUILTIN + "learner:\n  ranks: 1\n  threads: 1\n  ranks: 2\n", ["line 7", "learner.ranks", "after line 5"]),
    (BUILTIN + "learner: {ranks: 1, ranks: 2}\n", ["line 4", "learner.ranks"]),
    (BUILTIN + "learner: {fp8: {recipe: delayed, recipe: mxfp8}}\n", ["line 4", "learner.fp8.recipe"]),
    (BUILTIN + "learner:\n\tranks: 1\n", ["line 5", "tab", "spaces"]),
    (BUILTIN + "learner:\n  ranks:1\n", ["line 5", "learner = ranks:1", "space after the colon"]),
    (BUILTIN + "algorithm: {type:ppo}\n", ["line 4", "type: ppo"]),
    (BUILTIN + "learner:\n  ranks:1\n  threads: 2\n", ["line 6", "not valid YAML"]),
    (BUILTIN + "---\nrun: {}\n", ["line 4", "second document"]),
    (BUILTIN + "learner.ranks: 1\n", ["learner.ranks = 1", "learner: {ranks: 1}"]),
    (BUILTIN + "1: 2\n", ["1 = 2: no such key"]),
    (BUILTIN + "on: 2\n", ["on = 2: no such key"]),
    (BUILTIN + "? [a]\n: 1\n", ["line 4", "key must be text"]),
    (BUILTIN + "run: {name: {{ name }}}\n", ["line 4", "template"]),
    (BUILTIN + "run: {name: !env NAME}\n", ["line 4", "the tag !env"]),
    (BUILTIN + "learner: &a\n  fp8: *a\n", ["line 4", "alias"]),
    (BUILTIN + "learner: {<<: [1]}\n", ["line 4", "`<<`"]),
    (BUILTIN + "learner: {<<: *none}\n", ["line 4", "alias"]),
    (BUILTIN + "learner: {timeout_s: 10:00}\n", ["learner.timeout_s = 10:00", "base 60"]),
    (BUILTIN + "run: {seed: 0777}\n", ["line 4", "run.seed = 0777", "octal"]),
    (BUILTIN + "run: {name: 'x}\n", ["not valid YAML"]),
    ("", ["is empty"]),
    ("- model\n", ["must hold sections", "not a list"]),
    ("text", ["must hold sections", "not text"]),
    ("run: {}\n", ["model: missing", "model: {hf: ...}"]),
    ("model:\n", ["model.layers is missing"]),
    (b"run: a\n\xff", ["line 2", "not UTF-8"]),
    (b"PK\x03\x04\x00", ["line 1", "character"]),
    (OWN.replace("solution_field: answer, ", "").replace("gsm8k", "builtin") + "warm_start: {steps: 3}\n", ["reward.type"]),
]  # fmt: skip


@pytest.mark.parametrize(("content", "named"), FILES, ids=[str(content[-40:]) for content, _ in FILES])
def test_a_configuration_file(told, content: str | bytes, named: list[str]):
    Path("c.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    line = told("train", "c.yaml")
    assert [part for part in ["c.yaml", *named] if part not in line and "line" in named[0]] == [], line
    assert [part for part in named if part not in line] == [], line


DATA = [
    (ROW + "{broken\n", ["t.jsonl:2", "not JSON", "one JSON object"]),
    (ROW + '{"prompt": "2 + 2?", "ans', ["t.jsonl:2", "ends in the middle of this line"]),
    (ROW + '{"prompt": "2 + 2?", "answers": "#### 4"}\n', ["t.jsonl:2", "did you mean data.solution_field = answers?"]),
    (ROW + '{"question": "2 + 2?", "answer": "#### 4"}\n', ["t.jsonl:2", "'question', 'answer'", "data.prompt_field"]),
    (ROW + '{"prompt": 3, "answer": "#### 4"}\n', ["t.jsonl:2", "field 'prompt' is a number"]),
    (ROW + '{"prompt": null, "answer": "#### 4"}\n', ["t.jsonl:2", "field 'prompt' is null"]),
    (ROW + '{"prompt": [{"role": "user"}], "answer": "#### 4"}\n', ["t.jsonl:2", "message 1", "`content`"]),
    (ROW + '{"prompt": " ", "answer": "#### 4"}\n', ["t.jsonl:2", "is empty"]),
    (ROW + '{"prompt": "2 + 2?", "answer": "four"}\n', ["t.jsonl:2", "`#### <number>`", "data.solution_field"]),
    (ROW + '{"prompt": "a", "prompt": "b", "answer": "#### 4"}\n', ["t.jsonl:2", "'prompt' is there twice"]),
    (ROW + json.dumps({"prompt": "b" * 200, "answer": "#### 4"}) + "\n", ["t.jsonl:2", "tokens", "data.long_prompts"]),
    (ROW + '{"prompt": "\\ud800", "answer": "#### 4"}\n', ["t.jsonl:2", "Unicode"]),
    (ROW + '"text"\n', ["t.jsonl:2", "a string, not an object"]),
    (ROW.encode() + b'{"prompt": "\xe9", "answer": "#### 4"}\n', ["t.jsonl:2", "not UTF-8", "0xe9"]),
    (ROW.encode() + b"\0\0\0\0\n", ["t.jsonl:2", "NUL"]),
    (ROW.encode() + b'{"prompt": "a\0b", "answer": "#### 4"}\n', ["t.jsonl:2", "NUL"]),
    (ROW.replace("\n", "\r") * 2, ["t.jsonl:1", "\\r alone"]),
    ("[\n" + ROW + "]\n", ["t.jsonl:1", "jq"]),
    ('{\n"prompt": "a"\n}\n', ["t.jsonl:1", "jq"]),
    ("", ["data.train = t.jsonl", "has no prompts"]),
    (ROW, ["data.train = t.jsonl", "data.eval_prompts = 1"]),
    (b"\xff\xfe{\0", ["t.jsonl", "UTF-16"]),
    (b"\x1f\x8b\x08", ["t.jsonl", "gunzip"]),
    (b"PAR1", ["t.jsonl", "Parquet"]),
    (b"version https://git-lfs.github.com/spec/v1\n", ["t.jsonl", "git lfs pull"]),
]


@pytest.mark.parametrize(("content", "named"), DATA, ids=[str(content[-40:]) for content, _ in DATA])
def test_a_data_file(told, content: str | bytes, named: list[str]):
    Path("t.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    Path("c.yaml").write_text(OWN)
    line = told("train", "c.yaml", "--dry-run")
    assert [part for part in named if part not in line] == [], line


READS_SOLUTIONS = [
    ("{type: gsm8k}", "reward.type = gsm8k"),
    ("{type: math}", "reward.type = math"),
    ("[{type: length, per_token: 0.1}, {type: math}]", "reward.type = math"),
    ("{type: judge, url: 'http://127.0.0.1:1/v1', model: m, against: solution}", "reward.against = solution"),
]
WITHOUT_SOLUTION = [
    ("", {"prompt": "1 + 1?", "size": 3}),
    ("prompt_field: prompt, ", {"prompt": "1 + 1?", "answer": "#### 2"}),  # with it no column is recognised
    ("", {"messages": [{"role": "user", "content": "1 + 1?"}]}),
]


@pytest.mark.parametrize(("reward", "who"), READS_SOLUTIONS, ids=[who for _, who in READS_SOLUTIONS])
@pytest.mark.parametrize(("keys", "row"), WITHOUT_SOLUTION, ids=["nothing", "named", "chat"])
def test_a_reward_without_the_solutions_that_it_reads(told, reward: str, who: str, keys: str, row: dict):
    Path("t.jsonl").write_text((json.dumps(row) + "\n") + json.dumps(row).replace("1 + 1", "2 + 2") + "\n")
    Path("c.yaml").write_text(MODEL + f"data: {{train: t.jsonl, {keys}eval_prompts: 1}}\nreward: {reward}\n")
    line = told("train", "c.yaml", "--dry-run")
    assert re.search(rf"t\.jsonl:[12] .*has no solution, which {who} needs: set data\.solution_field", line), line


SOURCES = [
    ("x.parquet", "is no Parquet file"),
    ("x.csv", "has no prompts"),
    ("x.json", "x.json:1: not JSON"),
    ("x.txt", "data.solution_field"),
    ("x.jsonl.gz", "is not compressed with gzip"),
    ("x.jsonl.zst", "unzstd"),
    ("x.ndjson", "x.ndjson:1: not JSON"),
    ("x.foo", "its name does not say how to read it"),
    ("folder", "any data files"),
    ("saved", "datasets cannot load it"),
    ("none.jsonl", "no such file"),
    ("none.parquet", "no such file"),
    ("openai/gsm8k", "hf:openai/gsm8k:<split>"),
    ("hf:gsm8k", "hf:openai/gsm8k:main:train"),
    ("hf:none.parquet:train", "no such file"),
    ("built-in", "`builtin`"),
    ("", "is empty"),
]


@pytest.mark.parametrize(("source", "way_out"), SOURCES, ids=[source for source, _ in SOURCES])
def test_a_source_of_data(told, source: str, way_out: str):
    for name, _ in SOURCES[:8]:
        Path(name).write_text("x")
    Path("folder").mkdir()
    Path("saved").mkdir()
    Path("saved/state.json").write_text("{}")
    Path("c.yaml").write_text(OWN.replace("t.jsonl", json.dumps(source)))
    line = told("train", "c.yaml", "--dry-run")
    assert line.startswith((f"data.train = {source}" if source else "data.train is empty", source)) and way_out in line


TABLE = Path(__file__).with_name("refusals.md")


def test_all_messages_are_in_the_table(told, tmp_path: Path):
    """Whoever changes a message reads it there; ASYNC_RLHF_TEST_WRITE=1 writes the table anew."""
    tables = {
        "Overrides of a configuration of a fresh model on the built-in task": [
            (f"`-s '{override}'`", BUILTIN, b"", ("train", "c.yaml", "-s", override)) for override, _ in OVERRIDES
        ],
        "Command lines": [(f"`{' '.join(line)}`", BUILTIN, b"", tuple(line)) for line, _ in COMMAND_LINES],
        "Configuration files": [(_quoted(content), content, b"", ("train", "c.yaml")) for content, _ in FILES],
        "Data files": [(_quoted(content), OWN, content, ("train", "c.yaml", "--dry-run")) for content, _ in DATA],
    }
    lines = ["# What is said to whoever gets something wrong", ""]
    lines += ["Made by `test_refusals.py`, which compares every message with this table."]
    for title, rows in tables.items():
        lines += ["", f"## {title}", "", "| given | said |", "| --- | --- |"]
        for given, config, data, command in rows:
            Path("c.yaml").write_bytes(config if isinstance(config, bytes) else config.encode())
            Path("t.jsonl").write_bytes(data if isinstance(data, bytes) else data.encode())
            lines.append(f"| {_cell(given)} | {_cell(told(*command).replace(f'{tmp_path}/', ''))} |")
    found = "\n".join(lines) + "\n"
    if "ASYNC_RLHF_TEST_WRITE" in os.environ:
        TABLE.write_text(found)
    assert found == TABLE.read_text()
    assert sum(map(len, tables.values())) >= 100


def _quoted(content: str | bytes) -> str:
    """What is peculiar to a file."""
    text = content.decode("latin-1") if isinstance(content, bytes) else content
    text = text.removeprefix(BUILTIN).removeprefix(ROW)
    return f"`{json.dumps(text if len(text) <= 100 else text[:97] + '...')}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def test_too_few_prompts_for_a_step_are_said(capsys: pytest.CaptureFixture[str]):
    """They are drawn several times a step, which somebody may mean."""
    from megatron_async_rlhf.config.load import load_config
    from megatron_async_rlhf.jobs.inputs import data_warnings, load_run_inputs, make_model_template

    Path("c.yaml").write_text(BUILTIN)

    def lines(*overrides: str) -> list[str]:
        config = load_config(Path("c.yaml"), overrides)
        make_model_template(config, Path("template"))
        return data_warnings(config, load_run_inputs(config, Path("template")))

    assert lines() == []
    (line,) = lines("data.train_prompts=5")
    assert line.startswith("data.train = builtin: its 5 prompts to train on are fewer than the 32 of a rollout")


def test_sft_has_a_dry_run(capsys: pytest.CaptureFixture[str]):
    Path("c.yaml").write_text(BUILTIN)
    assert run_command_line(app, ["sft", "c.yaml", "--dry-run", "-s", "warm_start.steps=4"]) == 0
    output = capsys.readouterr()
    assert output.err == "" and "steps: 4" in output.out
    assert (
        "# answered conversations: 32 to train on" in output.out
        and "# 4 steps of 64 sequences: 8.0 epochs" in output.out
    )
    assert "# learner.0: " in output.out and "generator.0" not in output.out
    assert sorted(path.name for path in Path().iterdir()) == ["c.yaml"]


def test_a_runs_directory_stands_for_the_run(told, capsys: pytest.CaptureFixture[str]):
    Path("run").mkdir()
    Path("run/config.yaml").write_text(BUILTIN)
    assert "run is the directory of a run: add --resume" in told("train", "run")
    assert "run is the directory of a run" in told("sft", "run", "-s", "warm_start.steps=2")
    assert run_command_line(app, ["train", "run", "--resume", "--dry-run", "-s", "run.seed=3"]) == 0
    output = capsys.readouterr().out
    assert f"{Path('run').absolute()} has no checkpoint yet" in output  # wherever it has been moved to
    assert "seed: 3" in output


@pytest.mark.parametrize("command", ["train", "sft"])
def test_what_is_recognised_and_left_out_is_said(command: str, capsys: pytest.CaptureFixture[str]):
    rows = [{"question": f"{number} + 1?", "answer": f"#### {number + 1}"} for number in range(6)]
    rows += [{"question": "", "answer": "#### 1"}, {"question": "2 + 2?", "answer": None}]
    Path("t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("c.yaml").write_text(OWN + "warm_start: {steps: 1}\n")
    assert run_command_line(app, [command, "c.yaml", "--dry-run", "-s", "data.bad_records=drop"]) == 0
    output = capsys.readouterr().out
    assert "# data.train = t.jsonl: prompts in 'question' (data.prompt_field" in output
    assert "# data.train = t.jsonl: 1 of 8 records are left out for an empty prompt; the first: t.jsonl:7: " in output
    assert "# data.train = t.jsonl: 1 of 8 records are left out for a wrong type; the first: t.jsonl:8: " in output
