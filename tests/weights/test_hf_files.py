"""Safetensors files as the safetensors library and Transformers see them."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from megatron_async_rlhf.errors import CheckpointError
from megatron_async_rlhf.formats import stored
from megatron_async_rlhf.formats.hf_files import INDEX, SafetensorsDirectory, write_safetensors
from megatron_async_rlhf.formats.stored import TensorSpec, WeightReader, find_tensor
from megatron_async_rlhf.models.hf_mapping import hf_shapes

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def read_tensor(reader: WeightReader, name: str, dtype: torch.dtype) -> torch.Tensor:
    spec = find_tensor(reader, name)
    target = torch.empty(spec.matrix, dtype=dtype)
    reader.read_into(target, name, 0, 0)
    return target.view(spec.shape)


def model_tensors(arch) -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(name, torch.randn(shape, generator=generator)) for name, shape in hf_shapes(arch).items()]


def specs_of(tensors: list[tuple[str, torch.Tensor]]) -> list[TensorSpec]:
    return [TensorSpec(name, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors]


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Every bit pattern, NaNs with payloads and negative zeros among them: what is only moved must not change."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 256, (count,), generator=generator, dtype=torch.int64).to(torch.uint8)
    return raw.view(dtype).view(shape)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(raw(a), raw(b))


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


@pytest.mark.parametrize("shard_bytes", [1, 3000, 10**9])
@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_transformers_loads_what_was_written(tmp_path: Path, make_arch, shard_bytes: int, tie_embeddings: bool):
    arch = make_arch(tie_embeddings=tie_embeddings)
    tensors = model_tensors(arch)
    write_safetensors(tmp_path, specs_of(tensors), iter(tensors), shard_bytes)
    (tmp_path / "config.json").write_text(json.dumps(arch.to_hf(eos_token_id=2)))
    model, report = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    loaded = dict(model.named_parameters())
    assert set(loaded) == {name for name, _ in tensors}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors)


def test_the_index_names_the_shard_of_every_tensor(tmp_path: Path):
    tensors = [(f"t{i}", torch.full((i + 1,), float(i))) for i in range(6)]  # 4, 8, 12, 16, 20, 24 bytes
    directory = tmp_path / "new" / "directory"
    write_safetensors(directory, specs_of(tensors), iter(tensors), shard_bytes=24)
    index = json.loads((directory / INDEX).read_text())
    assert index["metadata"]["total_size"] == 84
    shards = {"t0": 1, "t1": 1, "t2": 1, "t3": 2, "t4": 3, "t5": 4}
    assert index["weight_map"] == {name: f"model-{shard:05d}-of-00004.safetensors" for name, shard in shards.items()}
    files = {path.name: load_file(path) for path in directory.glob("*.safetensors")}
    assert sorted(files) == sorted(set(index["weight_map"].values()))
    for name, tensor in tensors:
        assert torch.equal(files[index["weight_map"][name]][name], tensor)
    assert sum(len(held) for held in files.values()) == len(tensors)


def test_one_shard_needs_no_index(tmp_path: Path):
    tensors = [("a", torch.ones(3)), ("b", torch.zeros(2, 2))]
    write_safetensors(tmp_path, specs_of(tensors), tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert list(load_file(tmp_path / "model.safetensors")) == ["a", "b"]


def test_views_of_a_reused_buffer_are_written_as_they_were(tmp_path: Path):
    """Gathered tensors are only valid until the next one is asked for."""

    def stream():
        buffer = torch.empty(2, 3)
        for i in range(3):
            yield f"t{i}", buffer.fill_(i).t()

    write_safetensors(tmp_path, [TensorSpec(f"t{i}", (3, 2), "float32") for i in range(3)], stream())
    loaded = load_file(tmp_path / "model.safetensors")
    assert [loaded[f"t{i}"].unique().tolist() for i in range(3)] == [[0.0], [1.0], [2.0]]
    assert loaded["t0"].shape == (3, 2)


def test_a_tensor_may_come_in_blocks_of_rows(tmp_path: Path):
    tensor = random_bits((7, 3), torch.bfloat16, 0)
    blocks = [("t", block) for block in tensor.split(2)]
    write_safetensors(tmp_path, specs_of([("t", tensor)]), blocks)
    assert same_bits(load_file(tmp_path / "model.safetensors")["t"], tensor)


def test_every_dtype_keeps_its_bits_side_by_side(tmp_path: Path):
    """An odd number of two-byte elements must not push four-byte ones off their alignment."""
    tensors = [(f"t{i}", random_bits((3, 5), DTYPES[i % 3], i)) for i in range(7)]
    write_safetensors(tmp_path, specs_of(tensors), tensors)
    loaded = load_file(tmp_path / "model.safetensors")
    assert all(same_bits(loaded[name], tensor) for name, tensor in tensors)
    ours = SafetensorsDirectory(tmp_path)
    assert all(same_bits(read_tensor(ours, name, tensor.dtype), tensor) for name, tensor in tensors)


@pytest.mark.parametrize("before", [10**9, 30], ids=["one file", "shards"])
@pytest.mark.parametrize("after", [10**9, 30, 60], ids=["one file", "shards", "fewer shards"])
def test_an_earlier_export_is_replaced_whole(tmp_path: Path, before: int, after: int):
    (tmp_path / "config.json").write_text("{}")
    old = [(f"old{i}", torch.ones(5)) for i in range(5)]
    new = [(f"new{i}", torch.ones(5)) for i in range(4)]
    write_safetensors(tmp_path, specs_of(old), old, before)
    write_safetensors(tmp_path, specs_of(new), new, after)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert {name for file in files for name in load_file(tmp_path / file)} == {f"new{i}" for i in range(4)}
    assert (tmp_path / INDEX).exists() is (len(files) > 1)
    assert len(files) == {10**9: 1, 30: 4, 60: 2}[after]
    assert not list(tmp_path.glob("*.partial"))
    assert (tmp_path / "config.json").exists()


def test_an_export_that_stops_midway_leaves_the_earlier_one(tmp_path: Path):
    old = [("a", torch.ones(5)), ("b", torch.ones(5))]
    write_safetensors(tmp_path, specs_of(old), old)

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        yield "a", torch.zeros(5)
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        write_safetensors(tmp_path, specs_of(old), stream(), shard_bytes=20)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert load_file(tmp_path / "model.safetensors")["a"].tolist() == [1.0] * 5


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors[::-1],
        lambda tensors: tensors[:1],
        lambda tensors: [*tensors, ("c", torch.ones(1))],
        lambda tensors: [(tensors[0][0], tensors[0][1].double()), tensors[1]],
        lambda tensors: [(tensors[0][0], torch.ones(6)), tensors[1]],
    ],
    ids=["other order", "too few", "too many", "other dtype", "too large"],
)
def test_a_stream_that_is_not_the_announced_one_is_refused(tmp_path: Path, change):
    tensors = [("a", torch.ones(5)), ("b", torch.ones(5))]
    with pytest.raises(CheckpointError):
        write_safetensors(tmp_path, specs_of(tensors), change(tensors))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("staging", [1, 40, 10**6])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_rectangle_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, staging: int, dtype: torch.dtype):
    monkeypatch.setattr(stored, "STAGING_BYTES", staging)
    tensors = {"matrix": random_bits((7, 5), dtype, 1), "vector": random_bits((9,), dtype, 2)}
    save_file(tensors, tmp_path / "model.safetensors")
    reader = SafetensorsDirectory(tmp_path)
    assert {name: spec.shape for name, spec in reader.tensors.items()} == {"matrix": (7, 5), "vector": (9,)}
    for name, tensor in tensors.items():
        whole = tensor.view(len(tensor), -1)
        for row, col, rows, cols in [(0, 0, *whole.shape), (2, 0, 4, whole.shape[1]), (3, whole.shape[1] - 1, 2, 1)]:
            target = torch.empty(rows, cols, dtype=dtype)
            reader.read_into(target, name, row, col)
            assert same_bits(target, whole[row : row + rows, col : col + cols])
            blocks = stored.read_blocks(reader, name, (row, row + rows), (col, col + cols), dtype)
            assert same_bits(torch.cat([block.clone() for block in blocks]), target)


def test_reading_rounds_as_torch_does(tmp_path: Path):
    tensor = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    save_file({"t": tensor}, tmp_path / "model.safetensors")
    assert same_bits(read_tensor(SafetensorsDirectory(tmp_path), "t", torch.bfloat16), tensor.bfloat16())


def test_only_the_files_of_the_index_count(tmp_path: Path):
    """Some repositories also ship the same weights under other names."""
    tensors = [("a", torch.ones(5)), ("b", torch.zeros(5))]
    write_safetensors(tmp_path, specs_of(tensors), tensors, shard_bytes=20)
    save_file({"a": torch.ones(1), "layers.0.wq": torch.ones(1)}, tmp_path / "consolidated.safetensors")
    assert list(SafetensorsDirectory(tmp_path).tensors) == ["a", "b"]


def test_the_index_does_not_count_beside_a_single_file(tmp_path: Path):
    """As in Transformers, which is what happens to an index that was left behind."""
    tensors = [("a", torch.ones(5)), ("b", torch.zeros(5))]
    write_safetensors(tmp_path, specs_of(tensors), tensors, shard_bytes=20)
    save_file({"a": torch.full((5,), 2.0)}, tmp_path / "model.safetensors")
    reader = SafetensorsDirectory(tmp_path)
    assert list(reader.tensors) == ["a"]
    assert read_tensor(reader, "a", torch.float32).eq(2).all()


def test_what_transformers_ignores_is_no_weight(tmp_path: Path):
    tensors = {
        "model.embed_tokens.weight": torch.randn(4, 2), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
    }  # fmt: skip
    output = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(tensors | output, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))
    assert list(SafetensorsDirectory(tmp_path).tensors) == ["model.embed_tokens.weight"]
    output["lm_head.weight"][0, 0] += 1
    save_file(tensors | output, tmp_path / "model.safetensors")
    assert "lm_head.weight" in SafetensorsDirectory(tmp_path).tensors  # tied in name only: somebody has to look at it
    (tmp_path / "config.json").write_text(json.dumps({"tie_word_embeddings": False}))
    assert "lm_head.weight" in SafetensorsDirectory(tmp_path).tensors


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def cut_the_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20])


def shard(directory: Path) -> Path:
    """The one file becomes a shard; where its index belongs."""
    (directory / "model.safetensors").rename(directory / "shard.safetensors")
    return directory / INDEX


def move_values(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"[0,60]", b"[4,64]"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda directory: (directory / "model.safetensors").unlink(), "holds no model.safetensors and no model.safetensors.index.json;"),
        (lambda directory: truncate(directory / "model.safetensors"), "its header describes"),
        (lambda directory: cut_the_header(directory / "model.safetensors"), "only the beginning of one"),
        (lambda directory: (directory / "model.safetensors").write_text("{}"), "only the beginning of one"),
        (lambda directory: (directory / "model.safetensors").write_bytes(b"\2" + b"\0" * 7 + b"xy"), "header"),
        (lambda directory: (directory / "model.safetensors").write_bytes(b"\2" + b"\0" * 7 + b"[]"), "header"),
        (lambda directory: shard(directory).write_text("{}"), "weight_map"),
        (lambda directory: shard(directory).write_text(json.dumps({"weight_map": {"t": "gone"}})), "gone is missing"),
        (
            lambda directory: shard(directory).write_text(json.dumps({"weight_map": {"x": "shard.safetensors"}})),
            "has no tensor x",
        ),
        (lambda directory: shard(directory).unlink(missing_ok=True), r"index.json, only shard.safetensors; save"),
        (lambda directory: (directory / "adapter_config.json").write_text("{}"), "holds an adapter"),
        (lambda directory: (directory / "model.safetensors").write_text("version https://git-lfs"), "pointer of Git LFS"),
        (lambda directory: move_values(directory / "model.safetensors"), "t begins at byte 4 of the values"),
        (lambda directory: save_file({"t": torch.ones(2).long()}, directory / "model.safetensors"), "t is I64"),
    ],
)  # fmt: skip
def test_broken_files_are_named(tmp_path: Path, damage, message: str):
    save_file({"t": torch.ones(5, 3)}, tmp_path / "model.safetensors")
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message) as error:
        SafetensorsDirectory(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path: Path):
    save_file({"t": torch.ones(5, 3)}, tmp_path / "model.safetensors")
    reader = SafetensorsDirectory(tmp_path)
    truncate(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="ends at byte"):
        read_tensor(reader, "t", torch.float32)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path):
    for name in ("a", "b"):
        save_file({"t": torch.ones(2), name: torch.ones(1)}, tmp_path / f"{name}.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {name: f"{name}.safetensors" for name in ("a", "b")}}))
    with pytest.raises(CheckpointError, match=r"b.safetensors has tensor t, and so has a.safetensors"):
        SafetensorsDirectory(tmp_path)


def test_a_tensor_that_is_not_there_is_named(tmp_path: Path):
    save_file({"t": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="has no tensor x"):
        read_tensor(SafetensorsDirectory(tmp_path), "x", torch.float32)
