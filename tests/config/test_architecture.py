import json
from pathlib import Path

import pytest
from transformers import LlamaConfig

from megatron_async_rlhf.config.architecture import Architecture, architecture_of, architecture_of_hf
from megatron_async_rlhf.config.layout_rules import check_layouts
from megatron_async_rlhf.errors import ConfigError


def refused(action, *parts: str) -> None:
    with pytest.raises(ConfigError) as error:
        action()
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


def write_hf(directory: Path, **changes) -> Path:
    config = {
        "model_type": "llama", "vocab_size": 99, "num_hidden_layers": 3, "hidden_size": 48, "intermediate_size": 80,
        "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-4,
        "rope_theta": 5000.0, "tie_word_embeddings": True,
    }  # fmt: skip
    merged = {key: value for key, value in (config | changes).items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(merged))
    return directory


def test_a_fresh_model_takes_its_defaults(load):
    arch = architecture_of(load().model, 261)
    assert arch == Architecture(
        vocab_size=261, layers=4, hidden_size=128, ffn_size=96, heads=4, kv_heads=4, head_dim=32, context_length=96,
        rope_theta=10000.0, norm_eps=1e-5, tie_embeddings=False, init_std=0.02,
    )  # fmt: skip


def test_a_hugging_face_directory_gives_its_shape(tmp_path: Path):
    assert architecture_of_hf(write_hf(tmp_path)) == Architecture(
        vocab_size=99, layers=3, hidden_size=48, ffn_size=80, heads=6, kv_heads=2, head_dim=8, context_length=128,
        rope_theta=5000.0, norm_eps=1e-4, tie_embeddings=True, init_std=0.02,
    )  # fmt: skip


def test_it_reads_what_transformers_writes_and_the_other_way_round(tmp_path: Path):
    arch = architecture_of_hf(write_hf(tmp_path, head_dim=10))
    LlamaConfig(**arch.to_hf(eos_token_id=2)).save_pretrained(tmp_path)
    assert architecture_of_hf(tmp_path) == arch
    theirs = LlamaConfig.from_pretrained(tmp_path)
    assert theirs.rope_parameters["rope_theta"] == 5000.0
    assert (theirs.head_dim, theirs.num_key_value_heads, theirs.rms_norm_eps) == (10, 2, 1e-4)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "gpt2"}, ["'gpt2'", "only llama"]),
        ({"model_type": ...}, ["None", "only llama"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, ["'llama3'", "only default"]),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, ["'linear'", "only default"]),
        ({"rope_parameters": {"rope_type": "yarn"}}, ["'yarn'", "only default"]),
        ({"attention_bias": True}, ["attention_bias", "without biases"]),
        ({"mlp_bias": True}, ["mlp_bias", "without biases"]),
        ({"hidden_act": "gelu"}, ["'gelu'", "only silu"]),
        ({"intermediate_size": ...}, ["no intermediate_size"]),
    ],
)
def test_an_unsupported_family_or_feature_is_named(tmp_path: Path, changes: dict, named: list[str]):
    refused(lambda: architecture_of_hf(write_hf(tmp_path, **changes)), f"model.hf = {tmp_path}", *named)


def test_a_directory_without_a_readable_config_is_named(tmp_path: Path):
    missing = tmp_path / "none"
    refused(lambda: architecture_of_hf(missing), f"model.hf = {missing}", "no config.json")
    (tmp_path / "config.json").write_text("{not json")
    refused(lambda: architecture_of_hf(tmp_path), f"model.hf = {tmp_path}", "cannot be read")


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"learner": {"tensor_parallel": 3}}, ["learner.tensor_parallel = 3", "divide the 4 attention heads"]),
        ({"generator": {"tensor_parallel": 8}}, ["generator.tensor_parallel = 8", "divide the 4 attention heads"]),
        (
            {"learner": {"tensor_parallel": 2}, "model": {"ffn_size": 95}},
            ["learner.tensor_parallel = 2", "divide the feed-forward size 95"],
        ),
        (
            {"generator": {"tensor_parallel": 2}, "model": {"heads": 6, "hidden_size": 60, "kv_heads": 3}},
            ["generator.tensor_parallel = 2", "3 key-value heads"],
        ),
        ({"learner": {"pipeline_parallel": 5}}, ["learner.pipeline_parallel = 5", "above the 4 layers"]),
        ({"learner": {"pipeline_parallel": 3}}, ["learner.pipeline_parallel = 3", "divide", "4 / 3 leaves 1"]),
        ({"generator": {"max_new_tokens": 96}}, ["generator.max_new_tokens = 96", "context of 96"]),
        ({"learner": {"micro_batch_tokens": 191}}, ["learner.micro_batch_tokens = 191", "2 x 96 = 192"]),
        ({"model": {"hidden_size": 62}}, ["model.hidden_size = 62", "multiple of model.heads = 4"]),
        ({"model": {"hidden_size": 60, "heads": 4}}, ["head size 15", "even"]),
        ({"model": {"hidden_size": 64}}, ["head size 16", "32, 64"]),
        ({"model": {"kv_heads": 3}}, ["model.kv_heads = 3", "divide model.heads = 4"]),
        ({"model": {"kv_heads": 8}}, ["model.kv_heads = 8", "divide model.heads = 4"]),
    ],
)
def test_a_layout_that_cannot_hold_the_model_is_refused(load, sections: dict, named: list[str]):
    config = load(**{"generator": {"max_new_tokens": 28}} | sections)
    refused(lambda: check_layouts(config, architecture_of(config.model, 261)), *named)


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"learner": {"tensor_parallel": 4, "pipeline_parallel": 4, "micro_batch_tokens": 192}},
        {"learner": {"tensor_parallel": 4}, "model": {"kv_heads": 1}},
        {"learner": {"tensor_parallel": 4}, "model": {"kv_heads": 2}},
        {"learner": {"tensor_parallel": 2}, "generator": {"tensor_parallel": 4, "max_new_tokens": 95}},
    ],
)
def test_a_layout_that_fits_is_accepted(load, sections: dict):
    config = load(**{"generator": {"max_new_tokens": 28}} | sections)
    check_layouts(config, architecture_of(config.model, 261))
