"""Every directory is loaded exactly as Transformers loads it, or refused in one line, by every command alike."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from directory_cases import BEGIN, CASES, DOCS, Case, as_markdown, build
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from megatron_async_rlhf import cli
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.data.conversation import one_turn
from megatron_async_rlhf.data.tokenizer import Tokenizer, make_byte_tokenizer
from megatron_async_rlhf.errors import CheckpointError, ConfigError, DataError
from megatron_async_rlhf.formats.open_weights import open_weights
from megatron_async_rlhf.formats.stored import DTYPES, find_tensor
from megatron_async_rlhf.jobs.inputs import check_inputs, make_model_template

SECTIONS = {
    "generator": {"max_new_tokens": 12},
    "data": {"train_prompts": 32, "eval_prompts": 8},
}
IDS = torch.arange(2, 62).view(2, 30)
PROMPTS = ["Reverse cat.", " two  words\n", "naïve e\u0301 日本 🦆 12345"]


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    make_byte_tokenizer(directory)
    return directory


@pytest.fixture
def model(case: Case, tmp_path: Path, byte_tokenizer: Path) -> Path:
    build(case, tmp_path / "model", byte_tokenizer)
    return tmp_path / "model"


def settings(model: Path, run: Path) -> dict:
    return SECTIONS | {"run": {"dir": str(run)}, "model": {"hf": str(model)}}


def ours(model: Path, scratch: Path) -> str:
    """The line with which what all commands share refuses it; empty if it does not."""
    config = RunConfig.model_validate(settings(model, scratch / "run"))
    try:
        make_model_template(config, scratch / "template")
        check_inputs(config, scratch / "template")
    except (CheckpointError, ConfigError, DataError) as error:
        return str(error)
    return ""


def theirs(model: Path) -> tuple[str, torch.Tensor | None]:
    """What becomes of the weights, and the logits if that is a model."""
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, output_loading_info=True)
        logits = loaded(IDS).logits
    except Exception:  # all kinds of them
        return "refuses", None
    return ("random", None) if info["missing_keys"] else ("loads", logits)


def their_prompts(model: Path) -> list[list[int]] | None:
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        chats = [[{"role": "user", "content": text}] for text in PROMPTS]
        return [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in chats]
    except Exception:  # all kinds of them
        return None


def our_logits(model: Path, scratch: Path) -> torch.Tensor:
    """Of a Transformers model made from what we understand of `config.json`, filled with what we read."""
    config = RunConfig.model_validate(settings(model, scratch / "run"))
    arch = check_inputs(config, scratch / "template").architecture
    reference = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**arch.to_hf(eos_token_id=257)), dtype=torch.float32
    )
    reader, state = open_weights(model), {}
    for name in reader.tensors:
        spec = find_tensor(reader, name)
        values = torch.empty(spec.matrix, dtype=DTYPES[spec.dtype])
        reader.read_into(values, name, 0, 0)
        state[name] = values.view(spec.shape).float()
    missing, unexpected = reference.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"} and arch.tie_embeddings == bool(missing)
    assert not unexpected
    reference.tie_weights()
    return reference(IDS).logits


@torch.no_grad()
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.what)
def test_a_directory_is_loaded_as_transformers_loads_it_or_refused(case: Case, model: Path, tmp_path: Path):
    outcome, logits = theirs(model)
    prompts = their_prompts(model)
    what_they_do = outcome if case.group != "tokenizer" else "refuses" if prompts is None else "loads"
    assert what_they_do == case.theirs
    line = ours(model, tmp_path)
    assert "\n" not in line
    assert bool(line) == bool(case.ours) and case.ours in line
    if line:
        assert str(model) in line
        return
    assert outcome == "loads" and torch.equal(our_logits(model, tmp_path), logits)
    tokenizer = Tokenizer.load(model)
    assert [tokenizer.render_prompt(one_turn(text)) for text in PROMPTS] == prompts
    reference = AutoTokenizer.from_pretrained(model)
    assert tokenizer.eos_token_id == reference.eos_token_id
    assert tokenizer.pad_token_id == (reference.eos_token_id if reference.pad_token is None else reference.pad_token_id)
    assert tokenizer.bos_token_id == reference.bos_token_id


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, list[str]]:
    """The exit code of `async-rlhf` and its lines on stderr."""
    monkeypatch.setattr(sys, "argv", ["async-rlhf", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code or 0, capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.what)
def test_every_command_says_the_same(case: Case, model: Path, tmp_path: Path, monkeypatch, capsys):
    """Dry runs of all; of what is refused also the commands themselves, which must not start anything."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings(model, tmp_path / "run") | {"warm_start": {"steps": 2}}))
    swept = [
        tmp_path / f"sweep{steps}.yaml" for steps in (0, 2)
    ]  # with a warm start the points begin with what it makes
    for steps, path in zip((0, 2), swept, strict=True):
        sections = {"warm_start": {"steps": steps}, "sweep": {"axes": {"seed": {"run.seed": [0]}}}}
        path.write_text(yaml.safe_dump(settings(model, tmp_path / "swept") | sections))
    commands = {"train": ["train", config, "--dry-run"], "sweep": ["sweep", swept[1], "--dry-run"]}
    if case.group != "tokenizer":  # import-hf copies the files of a tokenizer, and reads none
        commands["import-hf"] = ["import-hf", model, tmp_path / "imported", "--dtype", "float32"]
    if case.ours:
        commands |= {
            "sft": ["sft", config],
            "train, for real": ["train", config],
            "sweep, for real": ["sweep", swept[0]],
        }
    if "(on a CPU)" in case.what:
        del commands["import-hf"]  # it runs nothing
    for name, arguments in commands.items():
        code, lines = run(monkeypatch, capsys, *arguments)
        if not case.ours:
            assert (code, lines) == (0, []), name
            continue
        assert code == 2 and len(lines) == 1, (name, code, lines)
        assert lines[0].startswith("error: ") and case.ours in lines[0], (name, lines)
    assert not (tmp_path / "run").exists() and not (tmp_path / "swept").exists()
    assert (tmp_path / "imported").exists() == ("import-hf" in commands and not case.ours)


def test_a_description_without_weights_can_be_planned_with_and_not_started(
    tmp_path: Path, byte_tokenizer: Path, monkeypatch, capsys
):
    """The one difference: a dry run also plans for a machine that has the model, and says what it has not checked."""
    build(CASES[0], tmp_path / "model", byte_tokenizer)
    (tmp_path / "model/model.safetensors").unlink()
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings(tmp_path / "model", tmp_path / "run") | {"warm_start": {"steps": 2}}))
    monkeypatch.setattr(sys, "argv", ["async-rlhf", "train", str(config), "--dry-run"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert "# not checked, and needed for a start: weights: no model.safetensors" in capsys.readouterr().out
    for command in ("train", "sft"):
        code, lines = run(monkeypatch, capsys, command, config)
        assert code == 2 and "holds no model.safetensors and no model.safetensors.index.json" in lines[0]
    # What of it is here is checked.
    path = tmp_path / "model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 200}))
    code, (line,) = run(monkeypatch, capsys, "train", config, "--dry-run")
    assert code == 2 and "'<assistant>' has id 259, the model only 200 embeddings" in line


def test_the_docs_list_every_case():
    text = DOCS.read_text(encoding="utf-8")
    assert text[text.index(BEGIN) + len(BEGIN) :] == as_markdown(), "run tests/model_directories/directory_cases.py"
    assert len({case.what for case in CASES}) == len(CASES)
