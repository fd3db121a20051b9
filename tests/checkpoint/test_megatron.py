"""What `import-hf` writes, real Megatron ranks load; what they save, `export-hf` reads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_models import HFModel, assert_same, make_hf_model, read_directory
from torch.distributed.checkpoint import FileSystemReader

from megatron_async_rlhf.converter.convert import export_hf, import_hf
from megatron_async_rlhf.converter.sources import open_holders
from megatron_async_rlhf.converter.verify import compare

RANKS = Path(__file__).with_name("megatron_ranks.py")
TIMEOUT_S = 150
MODELS = {
    "llama": {"family": "llama"},
    "qwen2": {"family": "qwen2", "tied": True, "num_key_value_heads": 1},
    "qwen3": {"family": "qwen3"},
}
IMPORTED_AT = {"llama": (1, 1), "qwen2": (2, 2), "qwen3": (4, 4)}
# How `sharded_state_dict` cuts: the default stacks layers; Megatron-LM's trainer asks for the others.
METADATA = {"stacked": None, "apart": {"non_homogeneous_layers": True}, "singleton": {"singleton_local_shards": True}}
SAVED = [*((name, "stacked") for name in MODELS), ("llama", "apart"), ("qwen2", "singleton")]


class Ranks:
    """Files of one run of the ranks: TP2 x PP2 loads an import and saves, then TP1 x PP1 loads what was saved."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.models: dict[str, HFModel] = {}
        two, one = [], []
        for name, settings in MODELS.items():
            model = self.models[name] = make_hf_model(directory / "hf" / name, dtype=torch.float32, **settings)
            tensor, pipeline = IMPORTED_AT[name]
            import_hf(
                model.directory, self.imported(name), tensor_parallel=tensor, pipeline_parallel=pipeline, dtype=None
            )
            save = {str(self.saved(name, kind)): METADATA[kind] for saved, kind in SAVED if saved == name}
            job = {"name": name, "hf": str(model.directory)}
            readable = [str(model.directory), str(self.imported(name))]
            two.append(job | {"checkpoint": str(self.imported(name)), "save": save, "readable": readable})
            one.append(job | {"checkpoint": str(self.saved(name, "stacked")), "save": {}, "readable": []})
        layouts = [
            {"name": "two", "tensor": 2, "pipeline": 2, "ranks": 4, "jobs": two},
            {"name": "one", "tensor": 1, "pipeline": 1, "ranks": 1, "jobs": one},
        ]
        (directory / "job.json").write_text(json.dumps(layouts))
        self._run()

    def imported(self, name: str) -> Path:
        return self.directory / "imported" / name

    def saved(self, name: str, kind: str) -> Path:
        return self.directory / "saved" / kind / name

    def results(self, layout: str, name: str) -> list[dict]:
        return [json.loads(path.read_text())[name] for path in sorted(self.directory.glob(f"{layout}-rank*.json"))]

    def _run(self) -> None:
        command = [sys.executable, str(RANKS), str(self.directory / "job.json")]
        with (self.directory / "job.log").open("w") as log:
            code = subprocess.run(
                command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=TIMEOUT_S
            ).returncode
        if code:
            logs = [f"--- {path.name}\n{path.read_text()[-2000:]}" for path in sorted(self.directory.glob("*.log"))]
            raise AssertionError("\n".join(logs))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return Ranks(tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", MODELS)
def test_every_rank_gets_exactly_its_parameters_of_an_import(ranks: Ranks, name: str):
    results = ranks.results("two", name)
    assert len(results) == 4
    for result in results:
        assert result["parameters"] > 10
        assert result["wrong"] == []


@pytest.mark.parametrize("name", MODELS)
def test_what_two_by_two_ranks_saved_one_rank_loads(ranks: Ranks, name: str):
    (result,) = ranks.results("one", name)
    assert result["wrong"] == []


@pytest.mark.parametrize(("name", "kind"), SAVED)
def test_what_ranks_saved_is_exported_byte_for_byte(ranks: Ranks, tmp_path: Path, name: str, kind: str):
    model = ranks.models[name]
    export_hf(ranks.saved(name, kind), tmp_path / "exported", dtype=None, config=model.directory)
    assert_same(read_directory(tmp_path / "exported"), model.tensors)


@pytest.mark.parametrize(("name", "kind"), SAVED)
def test_a_checkpoint_without_description_is_verified_with_the_other_sides(ranks: Ranks, name: str, kind: str):
    result = compare(*open_holders(str(ranks.saved(name, kind)), str(ranks.imported(name))))
    assert not result.differing
    assert result.tensors == len(ranks.models[name].tensors)


@pytest.mark.parametrize("name", MODELS)
def test_an_import_is_what_megatron_itself_would_save(ranks: Ranks, tmp_path: Path, name: str):
    """The same keys, shapes, dtypes, boxes and objects, for the same layout."""
    import_hf(ranks.models[name].directory, tmp_path / "ours", tensor_parallel=2, pipeline_parallel=2, dtype=None)
    ours, theirs = described(tmp_path / "ours"), described(ranks.saved(name, "stacked"))
    assert ours == theirs
    for file in ("metadata.json", "common.pt"):
        assert (tmp_path / "ours" / file).exists()
    assert (tmp_path / "ours/metadata.json").read_text() == (ranks.saved(name, "stacked") / "metadata.json").read_text()
    common = [torch.load(path / "common.pt") for path in (tmp_path / "ours", ranks.saved(name, "stacked"))]
    assert common == [{}, {}]


@pytest.mark.parametrize("name", MODELS)
def test_an_import_names_all_states_of_transformer_engines_modules(ranks: Ranks, name: str):
    """They ask for them by these names: fused norms have none, a norm that stands alone has one."""
    modules = ["self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"]
    if name == "qwen3":
        modules += ["self_attention.q_layernorm", "self_attention.k_layernorm"]
    layers = 4
    expected = {f"decoder.layers.{m}._extra_state/shard_{i}_{layers}" for m in modules for i in range(layers)}
    expected |= {"decoder.final_layernorm._extra_state/shard_0_1"}
    metadata = FileSystemReader(ranks.imported(name)).read_metadata()
    assert {key for key in metadata.state_dict_metadata if "_extra_state" in key} == expected


def described(checkpoint: Path) -> dict:
    """Everything `.metadata` says about the content, as torch's own reader reads it, with each box's rank."""
    metadata = FileSystemReader(checkpoint).read_metadata()
    files = {
        (index.fqn, tuple(index.offset or ())): info.relative_path.split("_")[2]
        for index, info in metadata.storage_data.items()
    }
    entries = {}
    for key, entry in metadata.state_dict_metadata.items():
        boxes = [(tuple(c.offsets), tuple(c.sizes), files[key, tuple(c.offsets)]) for c in getattr(entry, "chunks", [])]
        if boxes:
            entries[key] = (tuple(entry.size), entry.properties.dtype, sorted(boxes))
        else:
            entries[key] = files[key, ()]
    return entries
