import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from megatron_async_rlhf.weights.hf_files import write_safetensors
from megatron_async_rlhf.weights.hf_mapping import hf_shapes


def model_tensors(arch) -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(name, torch.randn(shape, generator=generator)) for name, shape in hf_shapes(arch).items()]


@pytest.mark.parametrize("shard_bytes", [1, 3000, 10**9])
@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_transformers_loads_what_was_written(tmp_path: Path, make_arch, shard_bytes: int, tie_embeddings: bool):
    arch = make_arch(tie_embeddings=tie_embeddings)
    tensors = model_tensors(arch)
    write_safetensors(tmp_path, iter(tensors), shard_bytes)
    (tmp_path / "config.json").write_text(json.dumps(arch.to_hf(eos_token_id=2)))
    model, report = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    loaded = dict(model.named_parameters())
    assert set(loaded) == {name for name, _ in tensors}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors)


def test_the_index_names_the_shard_of_every_tensor(tmp_path: Path):
    tensors = [(f"t{i}", torch.full((i + 1,), float(i))) for i in range(6)]  # 4, 8, 12, 16, 20, 24 bytes
    write_safetensors(tmp_path / "new" / "directory", iter(tensors), shard_bytes=24)
    directory = tmp_path / "new" / "directory"
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 84
    shards = {"t0": 1, "t1": 1, "t2": 1, "t3": 2, "t4": 3, "t5": 4}
    assert index["weight_map"] == {name: f"model-{shard:05d}-of-00004.safetensors" for name, shard in shards.items()}
    files = {path.name: load_file(path) for path in directory.glob("*.safetensors")}
    assert sorted(files) == sorted(set(index["weight_map"].values()))
    for name, tensor in tensors:
        assert torch.equal(files[index["weight_map"][name]][name], tensor)
    assert sum(len(held) for held in files.values()) == len(tensors)


def test_one_shard_needs_no_index(tmp_path: Path):
    write_safetensors(tmp_path, [("a", torch.ones(3)), ("b", torch.zeros(2, 2))])
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert list(load_file(tmp_path / "model.safetensors")) == ["a", "b"]


def test_views_of_a_reused_buffer_are_written_as_they_were(tmp_path: Path):
    """Gathered tensors are only valid until the next one is asked for."""

    def stream():
        buffer = torch.empty(2, 3)
        for i in range(3):
            yield f"t{i}", buffer.fill_(i).t()

    write_safetensors(tmp_path, stream())
    loaded = load_file(tmp_path / "model.safetensors")
    assert [loaded[f"t{i}"].unique().tolist() for i in range(3)] == [[0.0], [1.0], [2.0]]
    assert loaded["t0"].shape == (3, 2)
