import math
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_async_rlhf.config.load import dump_config, load_config
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.config.sections import LearnerSection
from megatron_async_rlhf.errors import ConfigError

EXAMPLES = sorted(  # the stages of a recipe are no runs by themselves; tests/pipeline has them
    path
    for path in (Path(__file__).parents[2] / "examples").rglob("*.yaml")
    if not (path.parent / "pipeline.yaml").exists()
)


def test_defaults(load):
    config = load()
    assert config.run.path == Path("runs/run")
    assert config.run.seed == 0
    assert (config.learner.world_size, config.learner.data_parallel) == (1, 1)
    assert (config.learner.learning_rate, config.learner.lr_decay, config.learner.warmup_steps) == (3e-6, "linear", 0)
    assert config.warm_start.steps == 0
    assert (config.schedule.mode, config.schedule.max_staleness) == ("async", 1)
    assert (config.algorithm.type, config.algorithm.samples_per_prompt, config.algorithm.beta) == ("online_dpo", 2, 0.1)
    assert config.algorithm.missing_eos_reward == -1.0
    assert (config.data.train, config.data.eval, config.reward.type) == ("builtin", None, "builtin")
    assert (config.weights.transport, config.weights.verify) == ("gloo", "every")
    assert config.telemetry.wandb is None


@pytest.mark.parametrize("staleness", [0, 1, 7])
def test_sync_is_the_async_schedule_with_a_bound_of_zero(load, staleness: int):
    keys = {"max_staleness": staleness}
    assert load(schedule={"mode": "sync", **keys}).schedule.staleness_bound == 0
    assert load(schedule={"mode": "async", **keys}).schedule.staleness_bound == staleness


def test_more_ranks_than_the_model_needs_are_data_parallel(load):
    learner = load(learner={"tensor_parallel": 2, "pipeline_parallel": 2, "ranks": 12}).learner
    assert (learner.world_size, learner.data_parallel) == (12, 3)
    assert load(learner={"tensor_parallel": 2, "pipeline_parallel": 2}).learner.world_size == 4


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("run.seed=7", lambda c: c.run.seed, 7),
        ("learner.learning_rate=1e-5", lambda c: c.learner.learning_rate, 1e-5),
        ("learner.learning_rate=0.25", lambda c: c.learner.learning_rate, 0.25),
        ("model.tie_embeddings=true", lambda c: c.model.tie_embeddings, True),
        ("launch.pin_cores=false", lambda c: c.launch.pin_cores, False),
        ("algorithm.missing_eos_reward=null", lambda c: c.algorithm.missing_eos_reward, None),
        ("algorithm.missing_eos_reward=", lambda c: c.algorithm.missing_eos_reward, None),
        ("algorithm.missing_eos_reward=-2.5", lambda c: c.algorithm.missing_eos_reward, -2.5),
        ("run.name=my-run", lambda c: c.run.name, "my-run"),
        ('run.name="12"', lambda c: c.run.name, "12"),
        (" schedule.mode =sync", lambda c: c.schedule.mode, "sync"),
        ("run.dir=/tmp/a=b", lambda c: c.run.dir, Path("/tmp/a=b")),
        ("telemetry.wandb={}", lambda c: c.telemetry.wandb and c.telemetry.wandb.mode, "online"),
        ("telemetry.wandb.mode=offline", lambda c: c.telemetry.wandb and c.telemetry.wandb.mode, "offline"),
        ("telemetry.wandb.tags=[a, b]", lambda c: c.telemetry.wandb and c.telemetry.wandb.tags, ["a", "b"]),
        ("learner={tensor_parallel: 2}", lambda c: c.learner.tensor_parallel, 2),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_overrides(load, override: str, read, value):
    assert read(load(override)) == value
    assert read(load()) != value


def test_overrides_replace_what_the_file_says_and_the_last_one_wins(load):
    assert load("run.seed=2", "run.seed=3", run={"seed": 1}).run.seed == 3
    config = load("learner.tensor_parallel=2", learner={"micro_batch_tokens": 512})
    assert (config.learner.tensor_parallel, config.learner.micro_batch_tokens) == (2, 512)


def test_an_override_reaches_a_section_the_file_leaves_empty(load):
    assert load("learner.tensor_parallel=2", learner=None).learner.tensor_parallel == 2


def test_a_loaded_config_does_not_change(load):
    with pytest.raises(ValueError, match="frozen"):
        load().run.seed = 1


def test_dumped_and_loaded_again_it_is_equal(load, tmp_path: Path):
    config = load(
        "telemetry.wandb={tags: [x]}", "algorithm.missing_eos_reward=null", "run.dir=some/where",
        "data.eval=other.jsonl",
        data={"train": "hf:gsm8k:main:train", "prompt_field": "question", "solution_field": "answer"},
        reward={"type": "gsm8k"}, learner={"ranks": 2, "adam_eps": 1e-12},
    )  # fmt: skip
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rate=st.floats(1e-30, 1e30, allow_nan=False),
    name=st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,12}\Z"),
    seed=st.integers(0, 2**63),
    field=st.text(min_size=1, max_size=8),
)
def test_any_value_survives_the_round_trip(
    tmp_path: Path, minimal: dict, rate: float, name: str, seed: int, field: str
):
    """Names like `1e5` or `no` and floats like 1e-30 are where YAML loses types."""
    tree = minimal | {
        "run": {"name": name, "seed": seed}, "learner": {"learning_rate": rate}, "reward": {"type": "gsm8k"},
        "data": {"train": "train.jsonl", "prompt_field": field, "solution_field": "answer"},
    }  # fmt: skip
    config = RunConfig.model_validate(tree)
    (tmp_path / "again.yaml").write_text(dump_config(config))
    again = load_config(tmp_path / "again.yaml")
    assert again == config
    assert math.copysign(1, again.learner.learning_rate) == 1


def refused(action, *parts: str) -> None:
    with pytest.raises(ConfigError) as error:
        action()
    message = str(error.value)
    assert "\n" not in message, "one problem, one line"
    for part in parts:
        assert part in message


BAD_VALUES = [
    # section, keys, what the line must name: key, value, rule
    ("learnr", {"x": 1}, ["learnr", "no such key", "learner"]),
    ("learner", {"lr": 1}, ["learner.lr = 1", "no such key", "learning_rate"]),
    ("telemetry", {"wandb": {"team": "x"}}, ["telemetry.wandb.team = x", "no such key", "entity"]),
    ("model", {"layers": "four"}, ["model.layers = four", "whole number"]),
    ("model", {"layers": 0}, ["model.layers = 0", "greater than 0"]),
    ("model", {"layers": 2.5}, ["model.layers = 2.5", "whole number"]),
    ("model", {"layers": None}, ["model.layers is missing", "context_length"]),
    ("model", {"hf": "/some/dir"}, ["model.hf", "remove model.ffn_size"]),
    ("model", {"tokenizer": "bpe"}, ["model.tokenizer = bpe", "model.vocab_size"]),
    ("model", {"vocab_size": 300}, ["model.vocab_size", "model.tokenizer = bpe"]),
    ("model", {"tokenizer": "words"}, ["model.tokenizer = words", "'bytes' or 'bpe'"]),
    ("run", {"name": "a/b"}, ["run.name = a/b", "must be letters, digits"]),
    ("run", {"name": [5]}, ["run.name = [5]", "must be text"]),
    ("run", {"seed": -1}, ["run.seed = -1", "at least 0"]),
    ("schedule", {"max_staleness": -1}, ["schedule.max_staleness = -1", "at least 0"]),
    ("schedule", {"mode": "offline"}, ["schedule.mode = offline", "'sync' or 'async'"]),
    ("schedule", {"steps": 0}, ["schedule.steps = 0", "greater than 0"]),
    ("learner", {"ranks": 3, "tensor_parallel": 2}, ["learner.ranks = 3", "multiple", "2 x 1 x 1 = 2"]),
    ("learner", {"ranks": 2, "pipeline_parallel": 4}, ["learner.ranks = 2", "multiple", "1 x 4 x 1 = 4"]),
    ("learner", {"learning_rate": 1e-6, "min_learning_rate": 1e-5}, ["learner", "min_learning_rate = 1e-05", "above"]),
    ("warm_start", {"min_learning_rate": 1}, ["warm_start", "min_learning_rate = 1.0", "above learning_rate = 0.001"]),
    ("learner", {"adam_beta2": 1.0}, ["learner.adam_beta2 = 1.0", "less than 1"]),
    ("learner", {"learning_rate": math.inf}, ["learner.learning_rate = inf", "finite"]),
    ("learner", {"precision": "fp16"}, ["learner.precision = fp16", "'fp32' or 'bf16'"]),
    ("learner", {"virtual_stages": 2}, ["learner.virtual_stages = 2", "pipeline_parallel = 1 must be at least 2"]),
    ("learner", {"ranks": 3, "context_parallel": 2}, ["learner.ranks = 3", "1 x 1 x 2 = 2"]),
    (
        "learner",
        {"share_prompts": True, "context_parallel": 2},
        ["learner.share_prompts", "context_parallel = 2 divides"],
    ),
    ("learner", {"optimizer_offload": 0.5}, ["learner.optimizer_offload = 0.5", "run.device = cuda"]),
    ("learner", {"overlap_grad_reduce": True}, ["learner.overlap_grad_reduce", "1 must be at least 2"]),
    ("learner", {"ranks": 2, "overlap_param_gather": True}, ["overlap_param_gather", "distributed_optimizer"]),
    ("learner", {"precision": "bf16", "fp8": {"recipe": "mxfp8"}}, ["learner.fp8 = mxfp8", "run.device = cuda"]),
    ("learner", {"fp8": {"recipe": "e4m3"}}, ["learner.fp8.recipe = e4m3", "'tensorwise'"]),
    ("learner", {"fp8": {"recipe": "delayed", "bf16_layers": 1}}, ["bf16_layers = 1", "tensorwise"]),
    ("learner", [], ["learner = []", "section", "-s learner.learning_rate=3e-06"]),
    ("generator", {"temperature": 0}, ["generator.temperature = 0", "greater than 0"]),
    ("generator", {"port": 70000}, ["generator.port = 70000", "65535"]),
    ("algorithm", {"samples_per_prompt": 1}, ["algorithm.samples_per_prompt = 1", "at least 2"]),
    ("algorithm", {"beta": -0.1}, ["algorithm.beta = -0.1", "greater than 0"]),
    ("algorithm", {"loss": "hinge"}, ["algorithm.loss = hinge", "'sigmoid' or 'ipo'"]),
    ("reward", [{"type": "gsm8k"}, {"type": "taste"}], ["reward.1.type = taste", "one of builtin, gsm8k, function"]),
    ("reward", [{"type": "builtin", "format_reward": 0.2}], ["reward.0.format_reward", "reward.0.type = gsm8k"]),
    ("reward", [{}, {"type": "builtin"}], ["2 entries are called builtin", "name"]),
    ("reward", [{}, 3], ["reward.1 = 3", "{type: builtin}"]),
    ("reward", [], ["reward = []", "at least 1"]),
    ("reward", {"type": "function"}, ["reward.function", "missing"]),
    ("reward", {"type": "function", "function": "score"}, ["reward.function = score", "FILE.py:NAME"]),
    (
        "reward",
        {"type": "function", "function": "own.py:score", "kwargs": {"completions": 1}},
        ["reward.kwargs.completions", "rename one"],
    ),
    ("reward", {"type": "gsm8k"}, ["reward.type = gsm8k needs data.train", "`#### <number>`", "built-in prompts"]),
    ("reward", {"type": "math"}, ["reward.type = math needs data.train with solutions", "built-in prompts"]),
    ("reward", {"type": "ifeval"}, ["reward.type = ifeval", "data.train", "instruction_id_list and kwargs"]),
    ("reward", {"type": "gsm8k", "format_reward": 2}, ["reward.format_reward = 2", "at most 1"]),
    (
        "data",
        {"train": "prompts.jsonl"},
        ["reward.type = builtin", "data.train = prompts.jsonl (and there is no such file here)"],
    ),
    ("data", {"eval_prompts": "many"}, ["data.eval_prompts = many", "whole number"]),
    ("algorithm", {"overlong_buffer": 129}, ["algorithm.overlong_buffer = 129", "generator.max_new_tokens = 128"]),
    ("checkpoint", {"every_steps": True}, ["checkpoint.every_steps = true", "number"]),
    ("learner", {"learning_rate": True}, ["learner.learning_rate = true", "number"]),
    ("weights", {"verify": "never"}, ["weights.verify = never", "'every', 'first' or 'off'"]),
]


@pytest.mark.parametrize(("section", "keys", "named"), BAD_VALUES, ids=[f"{s}-{k}" for s, k, _ in BAD_VALUES])
def test_a_bad_value_is_one_line_with_key_value_and_rule(load, section: str, keys, named: list[str]):
    refused(lambda: load(**{section: keys}), *named)


def test_the_former_default_of_the_prompt_column_is_passed_over_where_nothing_has_columns(load):
    """It stands in the resolved configurations of older runs."""
    assert load(data={"prompt_field": "prompt"}) == load()
    data, reward = {"train": "t.jsonl", "prompt_field": "prompt", "solution_field": "a"}, {"type": "gsm8k"}
    assert load(data=data, reward=reward).data.prompt_field == "prompt"


BAD_ON_GPUS = [
    ({"weights": {"transport": "gloo"}}, ["weights.transport = gloo", "run.device = cuda", "nccl"]),
    ({"learner": {"ranks": 6}, "generator": {"replicas": 3}}, ["need 9 GPUs", "launch.gpus_per_node = 8"]),
    ({"learner": {"ranks": 2}, "weights": {"transport": "ipc"}}, ["learner.ranks = 2", "weights.transport = nccl"]),
    ({"learner": {"precision": "fp32", "context_parallel": 2}}, ["context_parallel = 2", "precision = bf16"]),
    ({"learner": {"precision": "fp32", "fp8": {}}}, ["learner.precision = bf16, not fp32"]),
    ({"learner": {"precision": "bf16", "fp8": {"parameters": True}}}, ["learner.fp8.parameters", "no such key"]),
    ({"learner": {"share_prompts": True}}, ["learner.share_prompts = true", "run.device = cpu"]),
    ({"learner": {"optimizer_offload": 0.5}}, ["learner.optimizer_offload = 0.5", "distributed_optimizer = true"]),
]


@pytest.mark.parametrize(("sections", "named"), BAD_ON_GPUS, ids=[str(s) for s, _ in BAD_ON_GPUS])
def test_a_bad_value_on_gpus(load, sections: dict, named: list[str]):
    defaults = {"run": {"device": "cuda"}, "learner": {"precision": "bf16"}, "weights": {"transport": "nccl"}}
    merged = defaults | {name: defaults.get(name, {}) | keys for name, keys in sections.items()}
    load(**defaults)
    refused(lambda: load(**merged), *named)


def test_each_problem_has_its_own_line(load):
    with pytest.raises(ConfigError) as error:
        load(run={"seed": -1}, learner={"nonsense": 1, "threads": 0})
    lines = str(error.value).split("\n")
    assert len(lines) == 3
    for key in ("run.seed = -1", "learner.nonsense = 1", "learner.threads = 0"):
        assert any(line.startswith(key) for line in lines)


def test_a_long_value_is_shortened(load):
    refused(lambda: load(run={"seed": "x" * 5000}), "run.seed = xxx", "...")


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("run.seed", ["'run.seed'", "section.key=value"]),
        ("=5", ["'=5'", "section.key=value"]),
        ("run..seed=5", ["'run..seed=5'", "section.key=value"]),
        ("run.seed.deep=5", ["run.seed is a value, not a section"]),
        ("run.seed={", ["'run.seed={'", "not valid YAML"]),
        ("learner.nonsense=5", ["learner.nonsense = 5", "no such key"]),
        ("nonsense.key=5", ["nonsense", "no such key"]),
        ("schedule.steps=many", ["schedule.steps = many", "whole number"]),
    ],
)
def test_a_bad_override_is_refused(load, override: str, named: list[str]):
    refused(lambda: load(override, run={"seed": 1}), *named)


def test_a_number_is_an_entry_of_a_list(load):
    rewards = [{"type": "builtin", "name": "a"}, {"type": "builtin", "name": "b"}]
    assert [entry.weight for entry in load("reward.1.weight=3", reward=rewards).rewards] == [1.0, 3.0]
    refused(
        lambda: load("reward.2.weight=3", reward=rewards), "reward is a list, whose entries are reward.0 to reward.1"
    )
    refused(lambda: load("reward.weight=3", reward=rewards), "reward is a list, whose entries are reward.0 to reward.1")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("model: [1, 2", "not valid YAML"),
        ("model:\n\tlayers: 4", "not valid YAML"),
        ("- model\n- learner", "not a list"),
        ("just text", "not text"),
        ("", "is empty"),
        ("run: {name: x}", "model: missing"),
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, content: str, named: str):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    refused(lambda: load_config(path), named)


def test_a_missing_or_unreadable_file_is_named(tmp_path: Path):
    refused(lambda: load_config(tmp_path / "none.yaml"), str(tmp_path / "none.yaml"), "does not exist")
    refused(lambda: load_config(tmp_path), str(tmp_path), "cannot be read")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\xd8")
    refused(lambda: load_config(tmp_path / "binary.yaml"), "binary.yaml", "cannot be read")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_load(path: Path):
    config = load_config(path)
    assert yaml.safe_load(dump_config(config))["run"]["name"] == config.run.name


def test_what_older_runs_say_of_fp8_parameters_is_passed_over():
    keys = {"precision": "bf16", "fp8": {"recipe": "tensorwise", "parameters": False}}
    assert LearnerSection.model_validate(keys) == LearnerSection.model_validate({**keys, "fp8": {}})
    with pytest.raises(ValueError, match="parameters"):
        LearnerSection.model_validate({**keys, "fp8": {"parameters": True}})
