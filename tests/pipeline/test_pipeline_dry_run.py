"""`async-rlhf pipeline --dry-run`: every stage's plan, with models that no stage has made yet. No GPU, no network, no process."""

import json
import re
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml
from huggingface_hub.errors import OfflineModeIsEnabled

from megatron_async_rlhf.cli import app
from megatron_async_rlhf.config.load import dump_config, load_config
from megatron_async_rlhf.jobs.inputs import make_model_template
from megatron_async_rlhf.launch.evaluation import load_for_evaluation
from megatron_async_rlhf.launch.recipe import load_recipe
from megatron_async_rlhf.pipeline.models_here import with_models_here
from megatron_async_rlhf.pipeline.records import Records
from megatron_async_rlhf.usage import run_command_line

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "examples").glob("*/pipeline.yaml"))
NOT_CHECKED = "# not checked, and needed for a start: "


@pytest.fixture(autouse=True)
def starts_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No process, no connection; scratch directories are made where the test sees what is left of them."""

    def refuse(*arguments: object, **keywords: object) -> None:
        raise AssertionError(f"started or connected: {arguments}")

    monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for variable in ("SLURM_NODEID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES"):
        monkeypatch.delenv(variable, raising=False)
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))


class Told:
    """What a dry run has printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str], recipe: Path | str, *overrides: str) -> None:
        arguments = [word for override in overrides for word in ("-s", override)]
        self.code = run_command_line(app, ["pipeline", str(recipe), "--dry-run", *arguments])
        self.out, self.err = capsys.readouterr()
        self.stages = {}
        for document in self.out.split("---\n")[1:]:
            head, *lines = document.splitlines()
            self.stages[re.fullmatch(r"# \[\d+/\d+\] (\w+): .*", head)[1]] = [head, *lines]

    @property
    def error(self) -> str:
        """The line that it ended with."""
        assert self.code == 2
        (line,) = [line for line in self.err.splitlines() if not line.startswith("warning: ")]
        return line.removeprefix("error: ")

    def missing(self, stage: str) -> list[str]:
        return [line.removeprefix(NOT_CHECKED) for line in self.stages[stage] if line.startswith(NOT_CHECKED)]

    def has(self, stage: str, pattern: str) -> bool:
        return any(re.match(pattern, line) for line in self.stages[stage])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.parent.name)
def test_every_stage_of_the_recipes_can_be_planned(recipe: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    told = Told(capsys, recipe.parent, f"dir={tmp_path / 'run'}")
    assert told.code == 0, told.err
    loaded = load_recipe(recipe.parent, [f"dir={tmp_path / 'run'}"])
    assert list(told.stages) == [stage.name for stage in loaded.stages]
    for stage, document in zip(loaded.stages, yaml.safe_load_all(told.out), strict=True):
        assert document == stage.config.model_dump(mode="json"), "the configuration that will run"
        name = stage.name
        assert told.has(name, r"# estimate, not a measurement: memory in GiB") and told.has(name, r"# .*: fits$")
        assert told.has(name, r"# controller: ") and told.has(name, r"# (policy|reward model): [\d.]+ M parameters")
        learns = stage.command != "eval"
        assert told.has(name, r"# learner\.0: ") == told.has(name, r"# learner stage ") == learns
        assert told.has(name, r"# (generator|policy)\.0: ") == (stage.command in ("train", "eval"))
        if stage.command in ("sft", "reward-model"):
            assert told.has(name, r"# (\d+ )?steps of \d+ ") or told.has(name, r"# \d+ steps$")
        served = stage.config.reward_workers if stage.command in ("train", "eval") else 0
        assert sum(line.startswith("# reward.") and ": " in line for line in told.stages[name]) >= served
        assert told.has(name, "# a worker of reward") == bool(served)
    assert "scratch" not in told.out and sorted(path.name for path in tmp_path.iterdir()) == ["scratch"]
    assert not list((tmp_path / "scratch").iterdir())


def test_torch_is_not_needed(tmp_path: Path, monkeypatch):
    monkeypatch.undo()
    program = "import sys\nfrom megatron_async_rlhf.cli import app\napp(sys.argv[1:], standalone_mode=False)\n" \
        "assert 'torch' not in sys.modules, 'the dry run loads torch'"  # fmt: skip
    command = [sys.executable, "-c", program, "pipeline", "examples/llama3.1-8b_no_robots", "--dry-run"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert told.returncode == 0, told.stderr


# --- a small recipe ------------------------------------------------------------------------------------------------

SHAPE = {"layers": 2, "hidden_size": 64, "ffn_size": 96, "heads": 2, "context_length": 96, "tokenizer": "bytes"}
DATA = {"train": "builtin", "train_prompts": 32, "eval_prompts": 8}
FILES = {
    "sft.yaml": {"model": SHAPE, "data": DATA, "sft": {"steps": 4, "batch_size": 8}},
    "pairs.yaml": {"data": DATA, "generator": {"max_new_tokens": 12}, "eval": {"samples": 2, "temperature": 1.0, "pairs": True}},
    "rm.yaml": {"data": {"eval_prompts": 8}, "reward_model": {"epochs": 2}},
    "rl.yaml": {"data": DATA, "generator": {"max_new_tokens": 12}, "schedule": {"steps": 2, "prompts_per_step": 8}, "reward": {"type": "reward_model"}},
    "eval.yaml": {"data": DATA, "generator": {"max_new_tokens": 12}},
}  # fmt: skip
FINAL = "checkpoints/final"
STAGES = [
    {"name": "sft", "command": "sft", "config": "sft.yaml"},
    {"name": "pairs", "command": "eval", "config": "pairs.yaml", "set": {"model.hf": f"{{sft}}/{FINAL}"}},
    {"name": "rm", "command": "reward-model", "config": "rm.yaml", "set": {"model.hf": f"{{sft}}/{FINAL}", "data.train": "{pairs}/pairs.jsonl"}},
    {"name": "rl", "command": "train", "config": "rl.yaml", "set": {"model.hf": f"{{sft}}/{FINAL}", "reward.model": f"{{rm}}/{FINAL}"}},
    {"name": "eval", "command": "eval", "config": "eval.yaml", "set": {"model.hf": "{rl}", "eval.kl_to": f"{{sft}}/{FINAL}"}},
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of the recipe."""
    for name, tree in FILES.items():
        (tmp_path / name).write_text(yaml.safe_dump(tree))
    write_recipe(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_recipe(folder: Path, **changes: dict) -> None:
    stages = [stage | {"set": stage.get("set", {}) | changes.get(stage["name"], {})} for stage in STAGES]
    (folder / "pipeline.yaml").write_text(yaml.safe_dump({"name": "small", "stages": stages}))


def complete(folder: Path, name: str, *overrides: str) -> None:
    """Leave what the stage's command would: of a model its description."""
    stage = with_models_here(load_stage(folder, name, *overrides))
    directory = stage.config.run.path
    make_model_template(stage.config, directory / FINAL, or_described=True)
    (directory / "config.yaml").write_text(dump_config(stage.config))
    (directory / "summary.json").write_text(json.dumps({"status": "completed", "stage": name}))
    records = Records(load_recipe(folder, overrides))
    records.begin(stage, continues=True).status = "completed"
    records.write()


def load_stage(folder: Path, name: str, *overrides: str):
    return next(stage for stage in load_recipe(folder, overrides).stages if stage.name == name)


def test_what_an_earlier_stage_makes_is_described_and_what_is_not_known_is_said(folder: Path, capsys):
    told = Told(capsys, folder)
    assert told.code == 0, told.err
    sft, rm, rl = (f"runs/small/{name}/{FINAL}" for name in ("sft", "rm", "rl"))
    assert told.missing("sft") == []
    assert told.missing("pairs") == [f"weights: those of model.hf = {sft}, which the stage sft makes"]
    assert told.missing("rm") == [
        f"weights: those of model.hf = {sft}, which the stage sft makes",
        "prompts: data.train = runs/small/pairs/pairs.jsonl, which the stage pairs makes",
    ]
    assert told.missing("rl")[1:] == [f"weights: those of reward.model = {rm}, which the stage rm makes"]
    # A run stands for its last policy.
    assert told.missing("eval")[0] == f"weights: those of model.hf = {rl}, which the stage rl makes"
    # What does not depend on weights is checked.
    assert told.has("sft", "# answered conversations: 32 to train on, 8 held out")
    assert told.has("rl", "# prompts: 32 to train on, 8 held out") and told.has("eval", "# prompts: 8 held out")
    assert told.has("rm", "# preference pairs: not checked") and told.has(
        "rm", "# steps of 64 pairs: as many as 2 epochs"
    )
    (server,) = [line for line in told.stages["rl"] if line.startswith("# reward.0: ")]
    assert f" --model {rm} " in server
    assert not (folder / "runs").exists()


def test_a_checkpoint_of_an_earlier_stage_has_its_shape(folder: Path, capsys):
    checkpoint = "checkpoints/step_000002"
    write_recipe(folder, eval={"model.hf": f"{{rl}}/{checkpoint}"})
    told = Told(capsys, folder)
    assert (
        told.missing("eval")[0] == f"weights: those of model.hf = runs/small/rl/{checkpoint}, which the stage rl makes"
    )


def test_stages_that_are_done_are_left_out_and_what_follows_sees_what_they_made(folder: Path, capsys):
    complete(folder, "sft")
    told = Told(capsys, folder)
    assert told.stages["sft"] == ["# [1/5] sft: is done"]
    assert told.missing("pairs")[0].startswith(f"weights: no model.safetensors in model.hf = runs/small/sft/{FINAL}")
    # With another configuration it is made anew, and so is what read from it.
    told = Told(capsys, folder, "sft.model.layers=4")
    assert told.has("sft", "# policy: 0.1") and told.has("pairs", "# policy: 0.1"), told.out
    assert told.missing("pairs") == [f"weights: those of model.hf = runs/small/sft/{FINAL}, which the stage sft makes"]


def test_a_stage_that_was_cut_off_is_planned_as_it_goes_on(folder: Path, capsys):
    complete(folder, "sft")
    summary = folder / "runs/small/sft/summary.json"
    summary.write_text(json.dumps({"status": "interrupted"}))
    before = sorted((path, path.read_bytes()) for path in (folder / "runs").rglob("*") if path.is_file())
    assert Told(capsys, folder).stages["sft"][0] == "# [1/5] sft: async-rlhf sft --resume"
    assert sorted((path, path.read_bytes()) for path in (folder / "runs").rglob("*") if path.is_file()) == before


WRONG = {
    "sft": (["sft.sft=null"], "sft: sft: the configuration has no section of that name"),
    "layout": (["rm.learner.tensor_parallel=4"], "rm: learner.tensor_parallel = 4"),
    "context": (["rl.generator.max_new_tokens=96"], "rl: generator.max_new_tokens = 96 leaves no room"),
    "reward model's context": (["rl.reward.context_length=200"], "rl: reward.context_length = 200 is above the 96 tokens"),
    "no reward model": ([f"rl.reward.model={FINAL}"], f"rl: reward.model = {FINAL}: no such directory"),
    "a policy that scores": ([f"rl.reward.model={{sft}}/{FINAL}"], f"rl: reward.model = runs/small/sft/{FINAL}: its config.json names LlamaForCausalLM"),
    "a reward model that speaks": ([f"eval.model.hf={{rm}}/{FINAL}"], f"eval: model.hf = runs/small/rm/{FINAL}: architectures = ['LlamaForSequenceClassification']"),
    "no such result": (["pairs.model.hf={sft}/checkpoint"], "pairs: model.hf = runs/small/sft/checkpoint: the stage sft (async-rlhf sft) makes no checkpoint, only checkpoints/final"),
    "no such data": (["rm.data.train={pairs}/pair.jsonl"], "rm: data.train = runs/small/pairs/pair.jsonl: the stage pairs (async-rlhf eval) makes no pair.jsonl, only answers.jsonl and pairs.jsonl"),
    "no pairs": (["pairs.eval.pairs=false"], "rm: data.train = runs/small/pairs/pairs.jsonl: the stage pairs (async-rlhf eval) makes no pairs.jsonl, only answers.jsonl"),
    "a model from nowhere": (["eval.eval.against=nowhere/x/y"], "eval: model.hf = nowhere/x/y: no config.json there"),
    "too few GPUs": (["rl.run.device=cuda", "rl.weights.transport=nccl", "rl.launch.gpus_per_node=2"], "rl: learner.ranks = 1, generator.replicas"),
    "data that is missing": (["sft.data.train=nowhere.jsonl"], "sft: data.train = nowhere.jsonl: no such file"),
    "taken": (["sft.sft.steps=4"], "sft: run.dir"),
    "too large": (
        [
            "rl.run.device=cuda", "rl.weights.transport=nccl", "rl.launch.gpus_per_node=3", "rl.launch.gpu_memory_gib=1",
        ],
        "rl: the learner is estimated to need",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_will_not_do_is_one_line_that_names_the_stage(what: str, folder: Path, capsys):
    settings, expected = WRONG[what]
    overrides, changes = [], {}
    for setting in settings:
        stage, key, value = re.fullmatch(r"(\w+)\.([\w.]+)=(.*)", setting).groups()
        if "{" in value:
            changes.setdefault(stage, {})[key] = value
        else:
            overrides.append(setting)
    write_recipe(folder, **changes)
    if what == "taken":
        (folder / "runs").touch()
    told = Told(capsys, folder, *overrides)
    assert told.error.startswith(expected), told.error
    assert not list((folder / "scratch").iterdir())


# --- models that are not here ---------------------------------------------------------------------------------------


def describe(directory: Path, **shape: int) -> None:
    config = load_config(directory.parent / "sft.yaml", [f"model.{key}={value}" for key, value in shape.items()])
    make_model_template(config, directory)
    (directory / "tokenizer.json").unlink()


@pytest.mark.parametrize("given", ["/data/base", "meta-llama/base"])
def test_a_model_that_is_not_here_is_planned_with_what_the_file_names(given: str, folder: Path, monkeypatch, capsys):
    """A path of another machine, or a name at a hub that cannot be reached."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(folder / "cache"))
    describe(folder / "shape", layers=3)
    (folder / "sft.yaml").write_text(yaml.safe_dump(FILES["sft.yaml"] | {"model": {"hf": "shape"}}))
    told = Told(capsys, folder, f"sft.model.hf={given}")
    assert told.code == 0, told.err
    assert [line.split(": ", 1)[1] for line in told.missing("sft")] == [
        f"that of model.hf = {given}, which is not here: planned with what shape says of it",
        f"those of model.hf = {given}, which is not here: planned with what shape says of it",
    ]
    assert told.has("sft", "# policy: 0.14 M parameters") and told.has("rl", "# policy: 0.14 M parameters")
    assert told.has("rm", "# reward model: 0.12 M parameters") and told.has("rl", "# prompts: not checked")
    assert f"hf: {given}\n" in told.out
    (folder / "shape/config.json").unlink()
    error = Told(capsys, folder, f"sft.model.hf={given}").error
    assert error.startswith(f"sft: model.hf = {given}: no ")


def test_data_at_a_hub_that_cannot_be_asked_is_not_checked(folder: Path, monkeypatch, capsys):
    def offline(name: str, config: str | None, split: str) -> None:
        raise OfflineModeIsEnabled("forbidden")

    monkeypatch.setattr("megatron_async_rlhf.data.hub._load", offline)
    data = "{train: 'hf:org/d:train', prompt_field: p, solution_field: s}"
    told = Told(capsys, folder, f"sft.data={data}", f"pairs.data={data}", "pairs.reward={type: length, per_token: 1}")
    assert told.code == 0, told.err
    for stage in ("sft", "pairs"):
        assert told.missing(stage)[-1].startswith(
            "prompts: data.train = hf:org/d:train: the dataset org/d is not in the cache"
        )
    assert told.has("sft", "# answered conversations: not checked") and told.has("pairs", "# prompts: not checked")


def test_a_policy_at_the_hub_and_a_run_as_policy_are_known_again(folder: Path, tmp_path: Path, monkeypatch):
    """What a stage's directory says of its configuration is what the pipeline compares."""
    snapshot = tmp_path / "hub/models--org--base/snapshots/1"
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(snapshot))
    named = load_stage(folder, "sft", "sft.model={hf: org/base}")
    assert with_models_here(named).config.model.hf == snapshot
    complete(folder, "sft")
    complete(folder, "rl")
    stage = load_stage(folder, "eval")
    (folder / "given.yaml").write_text(dump_config(stage.config))
    assert with_models_here(stage).config == load_for_evaluation(folder / "given.yaml", [], resume=False)
    assert with_models_here(stage).config.model.hf == Path("runs/small/rl") / FINAL
