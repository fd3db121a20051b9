"""Keys without effect are refused in one line that names both keys; what the project itself writes always loads again."""

from pathlib import Path

import pytest
import yaml

from megatron_async_rlhf.config.effects import _NEEDS, _value_of
from megatron_async_rlhf.config.load import dump_config, load_config
from megatron_async_rlhf.errors import ConfigError

EXAMPLES = sorted(  # the stages of a recipe are no runs by themselves; tests/pipeline has them
    path
    for path in (Path(__file__).parents[2] / "examples").rglob("*.yaml")
    if not (path.parent / "pipeline.yaml").exists()
)
CUDA = {"run": {"device": "cuda"}, "weights": {"transport": "nccl"}}
GSM8K = {"data": {"train": "train.jsonl", "solution_field": "answer"}, "reward": {"type": "gsm8k"}}
# What is set in vain, and the whole line.
IN_VAIN = [
    (
        {"reward": {"format_reward": 0.3}},
        "reward.format_reward = 0.3: no such key; it goes with reward.type = gsm8k, not builtin",
    ),
    (
        {"learner": {"min_learning_rate": 1e-7, "lr_decay": "constant"}},
        "learner.min_learning_rate = 1e-07 has no effect with learner.lr_decay = constant",
    ),
    (
        {"warm_start": {"min_learning_rate": 1e-7, "lr_decay": "constant"}},
        "warm_start.min_learning_rate = 1e-07 has no effect with warm_start.lr_decay = constant",
    ),
    ({**CUDA, "generator": {"kv_cache_gib": 2}}, "generator.kv_cache_gib = 2 has no effect with run.device = cuda"),
    ({"generator": {"gpu_memory_share": 0.5}}, "generator.gpu_memory_share = 0.5 has no effect with run.device = cpu"),
    ({"generator": {"cuda_graphs": False}}, "generator.cuda_graphs = false has no effect with run.device = cpu"),
    (
        {"learner": {"reference": "swapped"}, "algorithm": {"type": "best_of_n"}},
        "learner.reference = swapped has no effect with algorithm.type = best_of_n",
    ),
    (
        {"algorithm": {"type": "online_dpo", "reward_scale": "batch"}},
        "algorithm.reward_scale = batch has no effect with algorithm.type = online_dpo",
    ),
    (
        {"algorithm": {"type": "grpo", "cispo_high": 3}},
        "algorithm.cispo_high = 3.0 has no effect with algorithm.loss = clip: remove it, or set algorithm.loss = cispo",
    ),
    (
        {"launch": {"slurm": {"user": "me"}}},
        "launch.slurm.user = me has no effect with launch.slurm.tunnel = local: remove it, or set launch.slurm.tunnel = ssh",
    ),
    (
        {"data": {"prompt_field": "question"}},
        "data.prompt_field = question has no effect with data.train = builtin, which has no columns: remove it, or set data.train",
    ),
    ({"data": {"solution_field": "answer"}}, "data.solution_field = answer has no effect with data.train = builtin"),
    (
        {"data": {"chosen_field": "a", "rejected_field": "b"}},
        "data.chosen_field = a has no effect with data.train = builtin",
    ),
    ({"data": {"bad_records": "drop"}}, "data.bad_records = drop has no effect with data.train = builtin"),
]
IN_USE = [
    {**GSM8K, "reward": {"type": "gsm8k", "format_reward": 0.3}},
    {"learner": {"min_learning_rate": 1e-7}},
    {**CUDA, "generator": {"gpu_memory_share": 0.5, "cuda_graphs": False}, "launch": {"pin_cores": False}},
    {"generator": {"kv_cache_gib": 2}, "launch": {"pin_cores": False}},
    {"learner": {"reference": "swapped"}, "algorithm": {"type": "ppo", "reward_scale": "batch"}},
    {"algorithm": {"type": "grpo", "loss": "cispo", "cispo_high": 3}},
    # Switched off by a number, to be switched on again; and machines that are described although nothing runs there now.
    {"warm_start": {"steps": 0, "batch_size": 8}},
    {"algorithm": {"type": "ppo", "kl": {"coefficient": 0, "estimator": "k3"}}},
    {"schedule": {"mode": "sync", "max_staleness": 4}},
    {"launch": {"gpu": "h200", "gpu_memory_gib": 141, "gpus_per_node": 4, "join_timeout_s": 20}},
]


@pytest.mark.parametrize(("sections", "line"), IN_VAIN, ids=[line.split(" = ")[0] for _, line in IN_VAIN])
def test_a_key_set_in_vain_is_refused(load, sections: dict, line: str):
    with pytest.raises(ConfigError) as refused:
        load(**sections)
    assert str(refused.value).startswith(line) and "\n" not in str(refused.value)


def test_an_override_in_vain_is_refused_too(load):
    with pytest.raises(ConfigError, match="learner.min_learning_rate = 1e-07 has no effect"):
        load("learner.min_learning_rate=1e-7", "learner.lr_decay=constant")


@pytest.mark.parametrize("sections", IN_USE, ids=str)
def test_a_key_in_use_is_not(load, sections: dict, tmp_path: Path):
    config = load(**sections)
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_what_a_run_writes_down_loads_again(example: Path, tmp_path: Path):
    """It has every key, those without effect too."""
    config = load_config(example)
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config
    written = yaml.safe_load((tmp_path / "again.yaml").read_text())
    assert "min_learning_rate" in written["learner"]


def test_the_table_names_keys_that_exist(load):
    """Else a key that is renamed would silently be refused no more."""
    configs = [
        load(algorithm={"type": "grpo"}, launch={"slurm": {}}, sft={}, reward_model={}),
        load(algorithm={"type": "ppo"}),
    ]
    for keys, chooser, values in _NEEDS:
        for key in (*keys, chooser):
            assert any(_value_of(config, key) != (None, None) or key.endswith(OPTIONAL) for config in configs), key
        assert len(set(values)) == len(values)


OPTIONAL = ("slurm.user", "slurm.port", "slurm.identity")
