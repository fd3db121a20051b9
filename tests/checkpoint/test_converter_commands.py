"""`import-hf`, `export-hf` and `verify-weights` as a user runs them: output, exit codes, one line for bad input."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_models import HFModel, bits_of, write_shards
from safetensors.torch import save_file

from megatron_async_rlhf.cli import main


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Runs the command line in this process; exit code, standard output and standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["async-rlhf", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err

    return run


@pytest.fixture
def refused(run):
    """Runs a command that must be refused, and gives the one line it is refused with."""

    def refused(*arguments: object) -> str:
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert err.startswith("error: ") and err.count("\n") == 1
        return err

    return refused


@pytest.fixture
def model(make_model) -> HFModel:
    return make_model("llama")


def test_there_and_back_and_verified(run, model: HFModel, tmp_path: Path):
    checkpoint, exported = tmp_path / "new/checkpoint", tmp_path / "exported"
    exported.mkdir()  # empty is as good as new
    assert run("import-hf", model.directory, checkpoint, "--tensor-parallel", 2, "--pipeline-parallel", 4)[0] == 0
    assert run("export-hf", checkpoint, exported)[0] == 0
    for pair in [(model.directory, checkpoint), (exported, checkpoint), (model.directory, exported)]:
        code, out, _ = run("verify-weights", *pair)
        assert code == 0
        size = sum(len(bits_of(tensor)) for tensor in model.tensors.values())
        assert out == f"equal: {len(model.tensors)} tensors, {size} bytes in {len(model.tensors)} pieces compared\n"
    assert not list(tmp_path.rglob("*.partial"))


def test_the_module_runs_and_every_help_has_an_example(tmp_path: Path):
    for command in ("import-hf", "export-hf", "verify-weights"):
        arguments = [sys.executable, "-m", "megatron_async_rlhf", command, "--help"]
        result = subprocess.run(
            arguments, capture_output=True, text=True, timeout=60, env=os.environ | {"COLUMNS": "99"}
        )
        assert result.returncode == 0
        assert f"Example: async-rlhf {command} " in result.stdout


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.2.mlp.up_proj.weight", "model.norm.weight"]
)
@pytest.mark.parametrize("bit", [0, 15])
def test_one_bit_flipped_in_a_hugging_face_file(run, model: HFModel, tmp_path: Path, name: str, bit: int):
    run("import-hf", model.directory, tmp_path / "checkpoint", "--tensor-parallel", 2)
    tensors = model.tensors
    columns = tensors[name].shape[-1] if tensors[name].dim() > 1 else 1
    element = tensors[name].numel() - 3
    tensors[name].view(-1).view(torch.int16)[element] ^= -(2**15) if bit == 15 else 1
    write_shards(model.directory, tensors, 1)
    code, out, _ = run("verify-weights", model.directory, tmp_path / "checkpoint")
    assert code == 1
    row, column = divmod(element, columns)
    assert out.startswith(f"different: {name}: row {row}, column {column}\n1 of {len(tensors)} tensors differ")


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("model.layers.1.self_attn.k_proj.weight", 13),  # the second key-value head, inside Megatron's interleaving
        ("model.layers.3.mlp.up_proj.weight", 47),
        ("lm_head.weight", 36),
    ],
)
def test_one_bit_flipped_in_a_checkpoint_file(run, model: HFModel, tmp_path: Path, name: str, row: int, tensor: int):
    run("import-hf", model.directory, tmp_path / "checkpoint", "--tensor-parallel", tensor)
    needle = bits_of(model.tensors[name][row])
    hits = [path for path in (tmp_path / "checkpoint").glob("*.distcp") if needle in path.read_bytes()]
    assert len(hits) == 1
    data = bytearray(hits[0].read_bytes())
    data[data.index(needle) + 2 * 5] ^= 64
    hits[0].write_bytes(data)
    code, out, _ = run("verify-weights", model.directory, tmp_path / "checkpoint")
    assert code == 1
    assert out.startswith(f"different: {name}: row {row}, column 5\n1 of ")


def test_a_tensor_on_one_side_only(run, model: HFModel, tmp_path: Path):
    shutil.copytree(model.directory, tmp_path / "other")
    tensors = model.tensors
    del tensors["model.norm.weight"]
    write_shards(tmp_path / "other", tensors, 1)
    for pair in [(model.directory, tmp_path / "other"), (tmp_path / "other", model.directory)]:
        code, out, _ = run("verify-weights", *pair)
        assert code == 1
        assert out.startswith(f"different: model.norm.weight: is in {model.directory}, but not in {tmp_path / 'other'}")


def test_another_dtype_is_a_difference_unless_rounded(run, model: HFModel, tmp_path: Path):
    run("import-hf", model.directory, tmp_path / "checkpoint", "--dtype", "float32")
    code, out, _ = run("verify-weights", model.directory, tmp_path / "checkpoint")
    assert code == 1
    assert "model.embed_tokens.weight: is bfloat16 in" in out and "but float32 in" in out
    finite = {name: tensor.float().nan_to_num().bfloat16() for name, tensor in model.tensors.items()}
    write_shards(model.directory, finite, 1)
    run("import-hf", model.directory, tmp_path / "finite", "--dtype", "float32")
    assert run("verify-weights", model.directory, tmp_path / "finite", "--cast", "bfloat16")[0] == 0


def test_a_holder_that_cannot_be_read_is_bad_input(refused, model: HFModel, tmp_path: Path):
    assert f"{tmp_path / 'x'}: there is no such directory" in refused("verify-weights", model.directory, tmp_path / "x")
    assert "holds no model.safetensors and no model.safetensors.index.json" in refused(
        "verify-weights", tmp_path, model.directory
    )


def change_config(model: HFModel, **changes) -> None:
    path = model.directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(model: HFModel, **changes: torch.Tensor | None) -> None:
    tensors = model.tensors | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    write_shards(model.directory, {name: tensor for name, tensor in tensors.items() if tensor is not None}, 1)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 7)


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (lambda m: None, ["--tensor-parallel", 3], "--tensor-parallel = 3 must divide the 4 attention heads"),
        (lambda m: None, ["--tensor-parallel", 8], "--tensor-parallel = 8 must divide the 4 attention heads"),
        (lambda m: None, ["--pipeline-parallel", 3], "--pipeline-parallel = 3 must divide the model's 4 layers"),
        (lambda m: None, ["--pipeline-parallel", 8], "--pipeline-parallel = 8 is above the 4 layers"),
        (lambda m: shutil.rmtree(m.directory), [], "there is no such directory"),
        (lambda m: (m.directory / "config.json").unlink(), [], "has no config.json"),
        (lambda m: (m.directory / "config.json").write_text("{"), [], "config.json cannot be read"),
        (lambda m: (m.directory / "config.json").write_text("[1]"), [], "config.json is not a JSON object"),
        (lambda m: change_config(m, num_attention_heads=0), [], "num_attention_heads = 0 in config.json must be"),
        (lambda m: change_config(m, model_type="mixtral", num_local_experts=8), [], "is a mixture of experts"),
        (lambda m: change_config(m, model_type="gpt2"), [], "'gpt2' is not supported"),
        (lambda m: change_config(m, quantization_config={"bits": 4}), [], "quantization_config is not supported"),
        (
            lambda m: (m.directory / "model.safetensors").unlink(),
            [],
            "holds no model.safetensors and no model.safetensors.index.json",
        ),
        (lambda m: truncate(m.directory / "model.safetensors"), [], "but its header describes"),
        (lambda m: change_tensors(m, model__norm__weight=None), [], "has no tensor model.norm.weight"),
        (lambda m: change_tensors(m, model__norm__weight=torch.ones(9)), [], "has shape (9,), but config.json"),
        (lambda m: change_tensors(m, model__extra=torch.ones(9)), [], "model.extra has no place in a llama model"),
        (
            lambda m: change_config(m, tie_word_embeddings=True),
            [],
            "lm_head.weight is not equal to model.embed_tokens.weight",
        ),
        (
            lambda m: change_tensors(m, model__layers__1__mlp__up_proj__weight=torch.ones(48, 32)),
            [],
            "and model.layers.1.mlp.up_proj.weight is float32, but Megatron keeps both in one tensor; give --dtype",
        ),
    ],
)
def test_an_import_that_cannot_be(refused, model: HFModel, tmp_path: Path, damage, options: list, message: str):
    damage(model)
    assert message in refused("import-hf", model.directory, tmp_path / "out", *options)
    assert not list(tmp_path.iterdir())


def test_ranks_that_would_cut_through_query_key_and_value(refused, make_model, tmp_path: Path):
    model = make_model("llama", hidden_size=96, num_attention_heads=6, num_key_value_heads=1, head_dim=32)
    message = refused("import-hf", model.directory, tmp_path / "out", "--tensor-parallel", 3)
    assert "--tensor-parallel = 3 must divide the rows of query, key and value together: (6 + 2 x 1) heads" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["import-hf", "export-hf", "verify-weights"])
def test_without_torch(refused, model: HFModel, tmp_path: Path, monkeypatch, command: str):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "torch is not installed here" in refused(command, model.directory, tmp_path / "out")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: (c / "metadata.json").unlink(), "has no config.json"),
        (lambda c: (c / "metadata.json").write_text('{"sharded_backend": "zarr"}'), "in the format zarr"),
        (lambda c: (c / "metadata.json").write_text("[]"), "metadata.json cannot be read"),
        (lambda c: (c / ".metadata").unlink(), "has no .metadata"),
        (lambda c: (c / ".metadata").write_bytes(b"\x80\x04]."), "does not describe"),
        (lambda c: (c / ".metadata").write_bytes(b"nonsense"), ".metadata cannot be read"),
        (lambda c: shutil.rmtree(c / "hf"), "name the model's Hugging Face directory with --config"),
        (lambda c: truncate(c / "__0_0.distcp"), "__0_0.distcp is"),
        (lambda c: (c / "__1_0.distcp").unlink(), "__1_0.distcp is missing"),
        (lambda c: set_layers(c, 3), "has shape (4, 32), but config.json describes (3, 32)"),
    ],
)
def test_an_export_that_cannot_be(run, refused, model: HFModel, tmp_path: Path, damage, message: str):
    run("import-hf", model.directory, tmp_path / "checkpoint", "--tensor-parallel", 2)
    (tmp_path / "checkpoint/digests.json").unlink()  # as of an earlier version
    damage(tmp_path / "checkpoint")
    assert message in refused("export-hf", tmp_path / "checkpoint", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def set_layers(checkpoint: Path, layers: int) -> None:
    change_config(HFModel(checkpoint / "hf"), num_hidden_layers=layers)


@pytest.mark.parametrize("command", ["import-hf", "export-hf"])
def test_nothing_is_overwritten(run, refused, model: HFModel, tmp_path: Path, command: str):
    run("import-hf", model.directory, tmp_path / "checkpoint")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("precious")
    source = model.directory if command == "import-hf" else tmp_path / "checkpoint"
    assert f"{tmp_path / 'out'} exists and is not empty" in refused(command, source, tmp_path / "out")
    assert "cannot be written" in refused(command, source, tmp_path / "out/thesis.tex/below")
    assert os.listdir(tmp_path / "out") == ["thesis.tex"]
    assert (tmp_path / "out/thesis.tex").read_text() == "precious"


@pytest.mark.parametrize("command", ["import-hf", "export-hf"])
def test_a_full_disk_leaves_nothing(run, make_model, tmp_path: Path, command: str):
    model = make_model("llama", vocab_size=4000)
    run("import-hf", model.directory, tmp_path / "checkpoint")
    source = model.directory if command == "import-hf" else tmp_path / "checkpoint"
    program = [sys.executable, "-m", "megatron_async_rlhf", command, str(source), str(tmp_path / "out")]
    result = subprocess.run(
        program,
        capture_output=True,
        text=True,
        timeout=60,
        # A write beyond the limit fails as one beyond the end of the disk does.
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert result.returncode == 2
    assert re.fullmatch(rf"error: {tmp_path / 'out'} cannot be written \(.*\)\n", result.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_another_programs_metadata_does_not_make_a_checkpoint(run, model: HFModel):
    (model.directory / "metadata.json").write_text('{"about": "something else"}')
    assert run("verify-weights", model.directory, model.directory)[0] == 0


def test_a_model_in_two_files_without_an_index(refused, model: HFModel, tmp_path: Path):
    """Transformers does not load it either: nothing says that no file is missing."""
    tensors = model.tensors
    (model.directory / "model.safetensors").unlink()
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[:5]}, model.directory / "a.safetensors")
    save_file({name: tensors[name] for name in names[5:]}, model.directory / "b.safetensors")
    assert "only a.safetensors, b.safetensors" in refused("import-hf", model.directory, tmp_path / "checkpoint")


def test_an_export_of_what_is_neither_a_checkpoint_nor_a_run(refused, tmp_path: Path):
    (tmp_path / "examples").mkdir()
    message = refused("export-hf", tmp_path / "examples", tmp_path / "out")
    assert (
        message
        == f"error: {tmp_path / 'examples'} has no config.json; give a checkpoint that Megatron saved, or a run\n"
    )


def test_an_import_of_an_adapter_names_the_way_out(refused, tmp_path: Path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/adapter_config.json").write_text("{}")
    assert "merge it into its base model" in refused("import-hf", tmp_path / "lora", tmp_path / "out")
