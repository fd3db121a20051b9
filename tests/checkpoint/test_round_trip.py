"""Hugging Face to Megatron and back, byte for byte, in every family and layout."""

import json
from pathlib import Path

import pytest
import torch
from hf_models import FAMILIES, TOKENIZER_FILES, assert_same, read_directory, write_shards
from transformers import AutoModelForCausalLM

from megatron_async_rlhf.converter.convert import export_hf, import_hf
from megatron_async_rlhf.converter.sources import open_holders
from megatron_async_rlhf.converter.verify import compare
from megatron_async_rlhf.errors import CheckpointError
from megatron_async_rlhf.formats import stored
from megatron_async_rlhf.formats.digest import digest
from megatron_async_rlhf.formats.hf_files import SafetensorsDirectory
from megatron_async_rlhf.formats.holder import Box, StoredWeights

SIZES = [1, 2, 4]  # four stages: one layer each; four ranks: more than the two key-value heads


def import_model(source: Path, out: Path, tensor: int = 1, pipeline: int = 1, dtype: str | None = None) -> Path:
    import_hf(source, out, tensor_parallel=tensor, pipeline_parallel=pipeline, dtype=dtype)
    return out


@pytest.mark.parametrize("pipeline", SIZES)
@pytest.mark.parametrize("tensor", SIZES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_byte_comes_back(make_model, tmp_path: Path, family: str, tied: bool, tensor: int, pipeline: int):
    model = make_model(family, tied=tied, dtype=torch.bfloat16 if tied else torch.float32, shards=3)
    checkpoint = import_model(model.directory, tmp_path / "checkpoint", tensor, pipeline)
    files = {path.name for path in checkpoint.glob("*.distcp")}
    assert files == {f"__{rank}_0.distcp" for rank in range(tensor * pipeline)}
    export_hf(checkpoint, tmp_path / "exported", dtype=None)
    assert_same(read_directory(tmp_path / "exported"), model.tensors)
    assert ("lm_head.weight" in model.tensors) is not tied


@pytest.mark.parametrize("staging", [1, 100])
def test_a_small_staging_buffer_changes_nothing(
    make_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, staging: int
):
    model = make_model("qwen2")
    monkeypatch.setattr(stored, "STAGING_BYTES", staging)
    checkpoint = import_model(model.directory, tmp_path / "checkpoint", 2, 2)
    export_hf(checkpoint, tmp_path / "exported", dtype=None)
    assert_same(read_directory(tmp_path / "exported"), model.tensors)


@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (8, 4)], ids=str)
def test_grouped_heads_of_every_kind(make_model, tmp_path: Path, heads: tuple[int, int]):
    model = make_model("llama", num_attention_heads=heads[0], num_key_value_heads=heads[1])
    checkpoint = import_model(model.directory, tmp_path / "checkpoint", 4)
    export_hf(checkpoint, tmp_path / "exported", dtype=None)
    assert_same(read_directory(tmp_path / "exported"), model.tensors)


def test_the_layout_of_the_files_does_not_matter(make_model, tmp_path: Path):
    model = make_model("qwen3")
    layouts = [(1, 1), (4, 1), (2, 4)]
    checkpoints = [import_model(model.directory, tmp_path / f"{t}x{p}", t, p) for t, p in layouts]
    for other in (*checkpoints[1:], model.directory):
        assert not compare(*open_holders(str(checkpoints[0]), str(other))).differing


def test_everything_beside_the_weights_comes_along(make_model, tmp_path: Path):
    model = make_model()
    (model.directory / "README.md").write_text("not part of the model")
    checkpoint = import_model(model.directory, tmp_path / "checkpoint")
    export_hf(checkpoint, tmp_path / "exported", dtype=None)
    for name in ("config.json", "generation_config.json", *TOKENIZER_FILES):
        assert (tmp_path / "exported" / name).read_bytes() == (model.directory / name).read_bytes()
    assert not (tmp_path / "exported/README.md").exists()


@pytest.mark.parametrize("at", ["import", "export"])
@pytest.mark.parametrize(("before", "after"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_rounding_is_torchs_and_the_config_says_so(make_model, tmp_path: Path, before: str, after: str, at: str):
    model = make_model(dtype=getattr(torch, before))
    checkpoint = import_model(model.directory, tmp_path / "checkpoint", 2, dtype=after if at == "import" else None)
    export_hf(checkpoint, tmp_path / "exported", dtype=after if at == "export" else None)
    expected = {name: tensor.to(getattr(torch, after)) for name, tensor in model.tensors.items()}
    exported = read_directory(tmp_path / "exported")
    assert exported.keys() == expected.keys()
    for name, tensor in expected.items():
        assert exported[name].dtype == tensor.dtype
        assert torch.equal(exported[name].nan_to_num(), tensor.nan_to_num()), name
    assert json.loads((tmp_path / "exported/config.json").read_text())["dtype"] == after
    assert json.loads((checkpoint / "hf/config.json").read_text())["dtype"] == (after if at == "import" else before)


def test_an_old_configs_torch_dtype_is_kept_right(make_model, tmp_path: Path):
    model = make_model(dtype=torch.float32)
    path = model.directory / "config.json"
    config = json.loads(path.read_text())
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config))
    import_model(model.directory, tmp_path / "checkpoint", dtype="bfloat16")
    exported = json.loads((tmp_path / "checkpoint/hf/config.json").read_text())
    assert exported["torch_dtype"] == "bfloat16" and "dtype" not in exported


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_an_export_with_its_own_dtype(make_model, tmp_path: Path, family: str):
    model = make_model(family, tied=True)
    export_hf(import_model(model.directory, tmp_path / "checkpoint"), tmp_path / "exported", dtype=None)
    ours, report = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype="auto", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.bfloat16}
    assert_same(dict(ours.named_parameters()), model.tensors)


def test_norms_may_have_a_dtype_of_their_own(make_model, tmp_path: Path):
    model = make_model()
    mixed = {name: t.float() if "norm" in name else t for name, t in model.tensors.items()}
    mixed["model.norm.weight"] = mixed["model.norm.weight"].bfloat16()
    write_shards(model.directory, mixed, 1)
    export_hf(import_model(model.directory, tmp_path / "checkpoint", 2, 2), tmp_path / "exported", dtype=None)
    assert_same(read_directory(tmp_path / "exported"), mixed)
    assert json.loads((tmp_path / "exported/config.json").read_text())["dtype"] == "bfloat16"


def test_a_run_directory_stands_for_its_last_policy(make_model, tmp_path: Path):
    model = make_model(dtype=torch.float32)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("")
    with pytest.raises(CheckpointError, match="without a checkpoint: it has not got that far"):
        export_hf(run, tmp_path / "exported", dtype=None)
    (run / "checkpoints").mkdir()
    model.directory.rename(run / "checkpoints/final")
    export_hf(run, tmp_path / "exported", dtype=None)
    assert_same(read_directory(tmp_path / "exported"), read_directory(run / "checkpoints/final"))
    assert not compare(*open_holders(str(run), str(tmp_path / "exported"))).differing


def test_files_are_hashed_with_positive_zeros_where_the_other_side_has_no_others(make_model, tmp_path: Path):
    model = make_model()
    tensors = {name: tensor.float().nan_to_num().bfloat16() for name, tensor in model.tensors.items()}
    holders = []
    for zero in (0.0, -0.0):
        tensors["model.norm.weight"][5] = zero
        (tmp_path / str(zero)).mkdir()
        write_shards(tmp_path / str(zero), tensors, 1)
        holders.append(StoredWeights(SafetensorsDirectory(tmp_path / str(zero))))
    box = Box("model.norm.weight", (0, 32), (0, 1))
    assert holders[0].digest(box, "bfloat16", exact=True) != holders[1].digest(box, "bfloat16", exact=True)
    digests = {holder.digest(box, "bfloat16", exact=False) for holder in holders}
    assert digests == {digest(tensors["model.norm.weight"] + 0.0)}
