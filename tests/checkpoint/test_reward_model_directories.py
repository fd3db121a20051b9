"""Directories of reward models: what they say of themselves, and their weights to Megatron and back, byte for byte."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hf_models import FAMILIES, assert_same, random_bits, read_directory, write_shards
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.converter.convert import export_hf, import_hf
from megatron_async_rlhf.converter.sources import open_holders
from megatron_async_rlhf.converter.verify import compare
from megatron_async_rlhf.data.tokenizer import Tokenizer, make_byte_tokenizer
from megatron_async_rlhf.errors import CheckpointError
from megatron_async_rlhf.formats.classifier import describe_classifier
from megatron_async_rlhf.learner.megatron.reward_learner import starting_weights
from megatron_async_rlhf.models.architecture import architecture_of_hf
from megatron_async_rlhf.models.hf_mapping import hf_shapes
from megatron_async_rlhf.models.layout import matrix_shape

SHAPE = {
    "vocab_size": 37, "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "sliding_window": None, "tie_word_embeddings": True,
}  # fmt: skip


def write_classifier(directory: Path, family: str, *, labels: int = 1, dtype: torch.dtype = torch.float32) -> Path:
    """Names and shapes are those of Transformers, the weights random bits."""
    config = AutoConfig.for_model(family, **SHAPE, num_labels=labels, pad_token_id=0)
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    config.architectures, config.dtype = [type(model).__name__], dtype
    config.save_pretrained(directory)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    tensors = {name: random_bits(shape, dtype, seed) for seed, (name, shape) in enumerate(shapes.items())}
    write_shards(directory, tensors, 2)
    return directory


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_byte_comes_back(tmp_path: Path, family: str, tensor: int, pipeline: int):
    source = write_classifier(tmp_path / "source", family, dtype=torch.bfloat16)
    import_hf(source, tmp_path / "checkpoint", tensor_parallel=tensor, pipeline_parallel=pipeline, dtype=None)
    assert not compare(*open_holders(str(source), str(tmp_path / "checkpoint"))).differing
    export_hf(tmp_path / "checkpoint", tmp_path / "exported", dtype=None)
    assert_same(read_directory(tmp_path / "exported"), read_directory(source))
    assert (tmp_path / "exported/config.json").read_bytes() == (source / "config.json").read_bytes()


def test_a_head_that_differs_is_found(tmp_path: Path):
    source = write_classifier(tmp_path / "source", "llama")
    import_hf(source, tmp_path / "checkpoint", tensor_parallel=1, pipeline_parallel=1, dtype=None)
    tensors = read_directory(source)
    tensors["score.weight"][0, 5] = 1.0
    write_shards(source, tensors, 2)
    result = compare(*open_holders(str(source), str(tmp_path / "checkpoint")))
    assert result.differing == ["score.weight"]
    assert result.first == "score.weight: row 0, column 5"


def test_a_classifier_with_several_labels_is_refused(tmp_path: Path):
    source = write_classifier(tmp_path / "source", "llama", labels=3)
    with pytest.raises(CheckpointError, match=r"score.weight has shape \(3, 32\), but config.json describes \(1, 32\)"):
        import_hf(source, tmp_path / "checkpoint", tensor_parallel=1, pipeline_parallel=1, dtype=None)


def test_a_language_model_is_not_taken_for_a_classifier(make_model, tmp_path: Path):
    source = make_model("llama").directory
    assert not architecture_of_hf(source).has_score_head
    hf = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(hf | {"architectures": ["LlamaForSequenceClassification"]}))
    assert architecture_of_hf(source).has_score_head
    with pytest.raises(CheckpointError, match=r"architectures = .* is a reward model's, but there is no tensor score"):
        import_hf(source, tmp_path / "checkpoint", tensor_parallel=1, pipeline_parallel=1, dtype=None)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_checkpoint_of_a_policy_starts_a_reward_model_as_its_directory_does(make_model, tmp_path: Path, family: str):
    source = make_model(family, tied=True, dtype=torch.float32).directory
    import_hf(source, tmp_path / "checkpoint", tensor_parallel=2, pipeline_parallel=2, dtype=None)
    arch = architecture_of_hf(source).with_score_head()
    found = []
    for place in (source, tmp_path / "checkpoint"):
        reader = starting_weights(RunConfig.model_validate({"model": {"hf": str(place)}}), arch)
        tensors = {name: torch.empty(matrix_shape(shape)) for name, shape in hf_shapes(arch).items()}
        for name, target in tensors.items():
            reader.read_into(target, name, 0, 0)
        found.append(tensors)
    assert_same(*found)
    assert 0.5 < found[0]["score.weight"].std() * 33**0.5 < 1.5
    other = starting_weights(RunConfig.model_validate({"model": {"hf": str(source)}, "run": {"seed": 1}}), arch)
    head = torch.empty(1, 32)
    other.read_into(head, "score.weight", 0, 0)
    assert not torch.equal(head, found[0]["score.weight"])


@pytest.fixture
def described(make_model, tmp_path: Path):
    """Makes a policy's directory a reward model's; the byte tokenizer's end is `<eos>`, its padding `<pad>`."""

    def describe(family: str = "llama", **tokenizer) -> Path:
        directory = tmp_path / "described"
        shutil.copytree(make_model(family, vocab_size=260).directory, directory)
        (directory / "chat_template.jinja").unlink()
        make_byte_tokenizer(directory)
        settings = json.loads((directory / "tokenizer_config.json").read_text())
        (directory / "tokenizer_config.json").write_text(json.dumps(settings | tokenizer))
        describe_classifier(directory)
        return directory

    return describe


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_takes_the_description_for_a_model_with_one_label(described, family: str):
    directory = described(family)
    config = AutoConfig.from_pretrained(directory)
    assert (config.num_labels, config.problem_type, config.pad_token_id) == (1, "regression", 256)
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    assert config.architectures == [type(model).__name__]
    assert model.score.weight.shape == (1, 32)
    # Save for what both leave out or write of themselves, it is what Transformers writes.
    config.save_pretrained(directory / "saved")
    theirs, ours = (json.loads((place / "config.json").read_text()) for place in (directory / "saved", directory))
    for key in ("architectures", "id2label", "label2id", "problem_type", "pad_token_id"):
        assert ours[key] == theirs[key]
    describe_classifier(directory)  # of what is one already nothing changes
    assert json.loads((directory / "config.json").read_text()) == ours


@pytest.mark.parametrize("padding", ["<eos>", None])
def test_the_padding_token_is_never_the_one_that_ends_a_sequence(described, padding: str | None):
    """Transformers would read the token before the end: policies that pad with their end-of-sequence token are many."""
    directory = described(pad_token=padding)
    tokenizer, ours = AutoTokenizer.from_pretrained(directory), Tokenizer.load(directory)
    padding_id = json.loads((directory / "config.json").read_text())["pad_token_id"]
    assert padding_id == tokenizer.pad_token_id == ours.pad_token_id == 256
    assert ours.eos_token_id == tokenizer.eos_token_id == 257
