"""Models and datasets by their names at the hub, which is one on this machine: found, kept, refused in one line."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_hub import SHA, FakeHub, serve

from megatron_async_rlhf.config.load import check_tree
from megatron_async_rlhf.data.tokenizer import make_byte_tokenizer
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.formats.hub_snapshot import local_model, with_local_models
from megatron_async_rlhf.hub import hub_problem

MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 320, "hidden_size": 64,
    "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "max_position_embeddings": 96, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip
NOT_NEEDED = ("pytorch_model.bin", "original/config.json", "consolidated.safetensors", "onnx/config.json", "README.md")
# Prints a line for each argument: a directory or examples, or what is wrong.
PROGRAM = """
import sys
from pathlib import Path
from megatron_async_rlhf.config.data import DataSection
from megatron_async_rlhf.data.source import load_examples
from megatron_async_rlhf.errors import AsyncRLHFError
from megatron_async_rlhf.formats.hub_snapshot import local_model

for name in sys.argv[1:]:
    try:
        if name.startswith("hf:"):
            print([example.text for example in load_examples(DataSection(train=name, eval="builtin"), "train", 0)])
        else:
            name, _, part = name.partition("#")
            print(local_model(Path(name), "model.hf", weights=part != "description"))
    except AsyncRLHFError as error:
        print(error)
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    described = tmp_path_factory.mktemp("tiny")
    make_byte_tokenizer(described)
    tiny = {path.name: path.read_bytes() for path in described.iterdir()}
    tiny |= {"config.json": json.dumps(MODEL).encode(), "model.safetensors": b"weights"}
    tiny |= {name: b"{}" for name in NOT_NEEDED}
    lines = b"".join(json.dumps({"prompt": f"question {number}"}).encode() + b"\n" for number in range(3))
    repositories = {
        "models/org/tiny": tiny,
        "models/org/gated": {"config.json": b"{}"},
        "datasets/org/prompts": {"train.jsonl": lines},
        "datasets/org/gated": {"train.jsonl": lines},
    }
    with serve(FakeHub(repositories, {"org/gated"})) as hub:
        yield hub


@pytest.fixture
def asked(hub: FakeHub, tmp_path: Path) -> Callable[..., list[str]]:
    """What PROGRAM prints, a line for each name, with an empty cache at first."""

    def ask(*names: str, **environment: str) -> list[str]:
        return run(hub, tmp_path, [sys.executable, "-c", PROGRAM, *names], **environment).stdout.splitlines()

    return ask


def run(hub: FakeHub, folder: Path, command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1"} | environment
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.run(
        command, env=kept | settings, cwd=folder, capture_output=True, encoding="utf-8", timeout=120, check=False
    )


def test_a_model_is_downloaded_once_and_only_what_is_needed(
    hub: FakeHub, asked: Callable[..., list[str]], tmp_path: Path
):
    hub.served.clear()
    described, whole, by_tag, by_commit = asked("org/tiny#description", "org/tiny", "org/tiny@v1", f"org/tiny@{SHA}")
    directory = Path(whole)
    assert directory == tmp_path / f"home/hub/models--org--tiny/snapshots/{SHA}"
    assert described == whole == by_tag == by_commit
    files = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= files and not files & set(NOT_NEEDED)
    assert sorted(hub.served) == sorted(set(hub.served)), "a file was downloaded twice"
    hub.served.clear()
    assert asked("org/tiny", HF_HUB_OFFLINE="1") == asked("org/tiny", HF_ENDPOINT="http://127.0.0.1:9") == [whole]
    assert hub.served == []


def test_what_cannot_be_had_is_said_in_a_line_each(asked: Callable[..., list[str]]):
    lines = asked(
        "org/tiny@nope", "org/none", "org/gated", "hf:org/prompts:train", "hf:org/none:train", "hf:org/gated:train"
    )
    for line, beginning, way_out in zip(
        lines,
        [
            "model.hf = org/tiny@nope: no such directory; the model org/tiny at the hub has no such revision",
            "model.hf = org/none: no such directory; there is no model org/none at the hub, or it is private",
            "model.hf = org/gated: no such directory; the model org/gated at the hub is gated",
            "['question 0', 'question 1', 'question 2']",
            "data.train = hf:org/none:train: there is no dataset org/none at the hub, or it is private",
            "data.train = hf:org/gated:train: the dataset org/gated at the hub is gated",
        ],
        ["@", "correct the name", "HF_TOKEN", "", "correct the name", "HF_TOKEN"],
        strict=True,
    ):
        assert line.startswith(beginning) and way_out in line
    offline = asked("org/none", "hf:org/none:train", "hf:org/prompts:train", HF_HUB_OFFLINE="1")
    assert offline[0].startswith("model.hf = org/none: no such directory; the model org/none is not in the cache")
    assert offline[1].startswith("data.train = hf:org/none:train: the dataset org/none is not in the cache")
    assert all("HF_HUB_OFFLINE forbids" in line for line in offline[:2])
    assert offline[2] == lines[3]
    (unreachable,) = asked("org/none", HF_ENDPOINT="http://127.0.0.1:9")
    assert "the hub at http://127.0.0.1:9 cannot be reached (" in unreachable and "refused" in unreachable


def test_weights_that_are_missing_offline_are_said(asked: Callable[..., list[str]]):
    """Of a model that only a dry run has asked for so far."""
    (directory,) = asked("org/tiny#description")
    assert not (Path(directory) / "model.safetensors").exists()
    assert asked("org/tiny#description", HF_HUB_OFFLINE="1") == [directory]
    (line,) = asked("org/tiny", HF_HUB_OFFLINE="1")
    assert "is not in the cache, or only a part of it, and HF_HUB_OFFLINE forbids" in line


def test_a_dry_run_resolves_the_name_and_downloads_no_weights(hub: FakeHub, tmp_path: Path):
    (tmp_path / "c.yaml").write_text("model: {hf: org/tiny@v1}\ngenerator: {max_new_tokens: 16}\n")
    command = [sys.executable, "-m", "megatron_async_rlhf", "train", "c.yaml", "--dry-run"]
    told = run(hub, tmp_path, command)
    directory = tmp_path / f"home/hub/models--org--tiny/snapshots/{SHA}"
    assert told.returncode == 0, told.stderr
    assert f"hf: {directory}\n" in told.stdout and "which a start downloads" in told.stdout
    assert (directory / "config.json").is_file() and not (directory / "model.safetensors").exists()
    (tmp_path / "c.yaml").write_text("model: {hf: org/none}\n")
    refused = run(hub, tmp_path, command[:-1])
    assert refused.returncode == 2 and refused.stderr.startswith("error: model.hf = org/none: ")
    assert len(refused.stderr.splitlines()) == 1


def test_a_directory_of_that_name_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org/tiny").mkdir(parents=True)
    config = check_tree({"model": {"hf": "org/tiny"}, "algorithm": {"type": "ppo", "value_hf": "org/tiny"}})
    assert with_local_models(config) == config


@pytest.mark.parametrize("given", ["/models/org", "models/org/tiny", "tiny", "../org", "runs/x/checkpoints/final"])
def test_what_is_no_name_at_the_hub_is_left_as_it_is(given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # an import would fail
    assert local_model(Path(given), "model.hf") == Path(given)


def test_both_keys_that_name_models_are_resolved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    import huggingface_hub

    calls = []

    def snapshot_download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        calls.append((name, revision))
        return f"/cache/{name}"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    tree = {"model": {"hf": "one/policy"}, "algorithm": {"type": "ppo", "value_hf": "one/value@v2"}}
    config = with_local_models(check_tree(tree))
    assert (config.model.hf, config.algorithm.value_hf) == (Path("/cache/one/policy"), Path("/cache/one/value"))
    assert calls == [("one/policy", None), ("one/value", "v2")]


def test_a_full_disk_is_no_fault_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    import huggingface_hub

    def snapshot_download(*_: object, **__: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ConfigError, match=r"model.hf = full/disk: .*cannot be downloaded \(OSError: .*No space left"):
        local_model(Path("full/disk"), "model.hf")


def test_a_dataset_that_cannot_be_reached_is_told_by_what_is_below_the_library():
    try:
        try:
            raise ConnectionRefusedError(111, "Connection refused")
        except ConnectionRefusedError as below:
            raise ConnectionError("Couldn't reach 'org/x' on the Hub (ConnectError)") from below
    except ConnectionError as error:
        line = hub_problem(error, "dataset", "org/x")
    assert line is not None and "cannot be reached ([Errno 111] Connection refused)" in line
    assert hub_problem(ValueError("Unknown split"), "dataset", "org/x") is None
