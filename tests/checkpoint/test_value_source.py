"""What `algorithm.value_hf` names is checked before any process starts."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import CheckpointError, ConfigError
from megatron_async_rlhf.formats.value_source import open_value_source
from megatron_async_rlhf.jobs.inputs import check_value_weights, resolve_architecture
from megatron_async_rlhf.models.architecture import architecture_of_hf

POLICY = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def write_reward_model(directory: Path, *, labels: int = 1, **changed: object) -> Path:
    config = AutoConfig.for_model("llama", **POLICY | changed, num_labels=labels)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(directory)
    return directory


def config_with(policy: Path, source: Path) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"hf": str(policy)},
            "algorithm": {"type": "ppo", "value_hf": str(source)},
            "generator": {"max_new_tokens": 16},
        }
    )


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    """Only its description is read here."""
    return write_reward_model(tmp_path / "policy")


def check(policy: Path, source: Path) -> None:
    config = config_with(policy, source)
    architecture, _ = resolve_architecture(config, policy)
    check_value_weights(config, architecture)


def test_a_reward_model_of_the_policys_shape_is_taken(policy: Path, tmp_path: Path):
    check(policy, write_reward_model(tmp_path / "reward"))
    reader = open_value_source(tmp_path / "reward", architecture_of_hf(policy))
    assert reader.tensors["score.weight"].shape == (1, 64)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_hidden_layers": 3}, "its layers = 3 is not the policy's 2"),
        ({"vocab_size": 65}, "its vocab_size = 65 is not the policy's 64"),
        ({"rope_theta": 5e5}, "its rope_theta = 500000.0 is not the policy's"),
        ({"max_position_embeddings": 32}, "its context_length = 32 is not the policy's 64"),
    ],
)
def test_another_shape_is_refused_by_its_description(policy: Path, tmp_path: Path, changed: dict, message: str):
    source = write_reward_model(tmp_path / "reward", **changed)
    with pytest.raises(ConfigError) as refused:
        resolve_architecture(config_with(policy, source), policy)
    assert str(refused.value).startswith(f"algorithm.value_hf = {source}: {message}")
    assert "\n" not in str(refused.value)


def test_a_directory_that_is_no_model_is_refused_by_its_key(policy: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=rf"^algorithm.value_hf = {tmp_path}/nothing: no config.json"):
        resolve_architecture(config_with(policy, tmp_path / "nothing"), policy)


def test_a_longer_context_and_tied_embeddings_do_not_matter(policy: Path, tmp_path: Path):
    check(policy, write_reward_model(tmp_path / "reward", max_position_embeddings=128, tie_word_embeddings=True))


def test_several_labels_are_refused(policy: Path, tmp_path: Path):
    source = write_reward_model(tmp_path / "reward", labels=3)
    with pytest.raises(CheckpointError, match=rf"value_hf = {source}: score.weight has shape \(3, 64\), .* \(1, 64\)"):
        check(policy, source)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_missing_and_a_misshapen_weight_are_named(policy: Path, tmp_path: Path, name: str):
    source = write_reward_model(tmp_path / "reward")
    weights = load_file(source / "model.safetensors")
    save_file({key: value for key, value in weights.items() if key != name}, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"^algorithm.value_hf = {source}: .*no tensor {name}"):
        check(policy, source)
    save_file(weights | {name: torch.zeros(3, 3)}, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"^algorithm.value_hf = {source}: {name} has shape \(3, 3\)"):
        check(policy, source)


def test_a_causal_model_gives_the_body_only(policy: Path, tmp_path: Path):
    source = write_reward_model(tmp_path / "reward")
    weights = load_file(source / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, source / "model.safetensors")
    check(policy, source)
    assert "score.weight" not in open_value_source(source, architecture_of_hf(policy)).tensors
