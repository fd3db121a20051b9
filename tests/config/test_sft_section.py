"""The `sft` section, and what a stage without rewards may leave out."""

import pytest

from megatron_async_rlhf.config.load import check_tree, dump_config
from megatron_async_rlhf.config.yaml_values import parse_value
from megatron_async_rlhf.errors import ConfigError

MODEL = {"layers": 2, "hidden_size": 64, "ffn_size": 96, "heads": 2, "context_length": 96}


@pytest.mark.parametrize(
    ("section", "line"),
    [
        ({"epochs": 1, "steps": 2}, "sft.epochs and sft.steps say the same thing in two ways"),
        ({"batch_size": 1, "batch_tokens": 2}, "sft.batch_size and sft.batch_tokens say the same thing in two ways"),
        ({"warmup_steps": 1, "warmup_share": 0.1}, "sft.warmup_share and sft.warmup_steps say the same thing"),
        ({"export": "best"}, "sft.export = best chooses among evaluations: set sft.eval_every"),
        ({"answers": "first"}, "sft.answers"),
    ],
)
def test_keys_that_contradict_each_other_are_one_line(section: dict, line: str):
    with pytest.raises(ConfigError, match=line) as error:
        check_tree({"model": MODEL, "sft": section})
    assert "\n" not in str(error.value)


def test_a_stage_without_rewards_needs_none_and_loads_again():
    tree = {"model": MODEL, "sft": {}, "data": {"train": "chats.jsonl"}}
    config = check_tree(tree)
    assert check_tree(parse_value(dump_config(config))) == config
    with pytest.raises(ConfigError, match="reward.type = builtin scores the built-in prompts alone"):
        check_tree(tree | {"sft": None})


def test_a_share_of_the_steps_is_warmup():
    keys = check_tree({"model": MODEL, "sft": {"warmup_share": 0.03}}).supervised
    assert [keys.optimizer_keys(steps).warmup_steps for steps in (1, 100, 150)] == [0, 3, 4]


def test_without_the_section_it_is_the_warm_start():
    config = check_tree({"model": MODEL, "warm_start": {"steps": 7, "batch_size": 5, "learning_rate": 0.5}})
    keys = config.supervised
    assert (keys.steps, keys.batch_size, keys.learning_rate, keys.lr_decay, keys.answers) == (
        7,
        5,
        0.5,
        "cosine",
        "last",
    )
