"""Small Hugging Face models whose weights are random bits, written by the safetensors library."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True)
class HFModel:
    directory: Path

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return read_directory(self.directory)


def make_hf_model(
    directory: Path, family: str, *, tied: bool = False, dtype: torch.dtype = torch.bfloat16, shards: int = 1, **sizes
) -> HFModel:
    """Names and shapes are those of Transformers. 37 tokens: divisible by no number of ranks."""
    shape = {
        "vocab_size": 37, "num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": tied, "sliding_window": None,
    }  # fmt: skip
    if family in ("llama", "mistral", "qwen3"):
        shape["head_dim"] = 12
    config = AutoConfig.for_model(family, **shape | sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    tensors = {name: random_bits(shape, dtype, seed) for seed, (name, shape) in enumerate(names.items())}
    directory.mkdir(parents=True)
    config.architectures, config.dtype = [type(model).__name__], dtype
    config.save_pretrained(directory)
    (directory / "generation_config.json").write_text(json.dumps({"temperature": 0.6}))
    for name in TOKENIZER_FILES:
        (directory / name).write_text(f"{family}: {name}")
    write_shards(directory, tensors, shards)
    return HFModel(directory)


def write_shards(directory: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    if shards == 1:
        files = ["model.safetensors"]
    weight_map = {name: files[i % shards] for i, name in enumerate(tensors)}
    for file in files:
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, directory / file)
    if shards > 1:
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Every bit pattern, NaNs with payloads and negative zeros among them: what is only moved must not change."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 256, (count,), generator=generator, dtype=torch.int64).to(torch.uint8)
    return raw.view(dtype).view(shape)


def read_directory(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def bits_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """The same names, shapes, dtypes and bytes."""
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits_of(ours[name]) == bits_of(tensor), name
