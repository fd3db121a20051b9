"""`async-rlhf eval` before anything is started: what its paths stand for, what it refuses, its plan, what it continues with."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_async_rlhf.cli import app
from megatron_async_rlhf.config.load import dump_config, load_config
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.config.sections import ModelSection
from megatron_async_rlhf.converter.convert import import_hf
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.formats.open_weights import open_weights
from megatron_async_rlhf.jobs.evaluated_models import load_evaluation
from megatron_async_rlhf.jobs.inputs import make_model_template
from megatron_async_rlhf.launch import evaluation
from megatron_async_rlhf.launch.evaluation import check_evaluation, load_for_evaluation, make_servable
from megatron_async_rlhf.launch.evaluation_inputs import check_same_evaluation, digest_evaluation
from megatron_async_rlhf.launch.fleet import gather
from megatron_async_rlhf.launch.input_digests import write_input_digests
from megatron_async_rlhf.models.architecture import architecture_of_hf
from megatron_async_rlhf.models.hf_mapping import hf_shapes
from megatron_async_rlhf.usage import run_command_line

SHAPE = {"layers": 2, "hidden_size": 64, "ffn_size": 96, "heads": 2, "context_length": 96, "tokenizer": "bytes"}
DATA = "data: {train_prompts: 16, eval_prompts: 8}\ngenerator: {max_new_tokens: 12}\n"


@pytest.fixture(autouse=True)
def at_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty directory; nothing may be started."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess.Popen, "__init__", lambda *_, **__: pytest.fail("a process was started"))


def make_policy(directory: Path, fill: float = 0.5, **shape: object) -> Path:
    """A Hugging Face directory with all weights of one value."""
    import torch

    config = RunConfig(model=ModelSection.model_validate(SHAPE | shape))
    make_model_template(config, directory)
    shapes = hf_shapes(architecture_of_hf(directory))
    save_file({name: torch.full(size, fill) for name, size in shapes.items()}, directory / "model.safetensors")
    return directory


def make_run(directory: Path) -> Path:
    """As one that is completed leaves it."""
    make_policy(directory / "checkpoints/final")
    Path("fresh.yaml").write_text(f"model: {json.dumps(SHAPE)}\n{DATA}", encoding="utf-8")
    (directory / "config.yaml").write_text(dump_config(load_config(Path("fresh.yaml"), ["run.seed=7"])))
    (directory / "summary.json").write_text(json.dumps({"status": "completed"}))
    return directory


@pytest.fixture
def config(tmp_path: Path) -> Path:
    make_policy(tmp_path / "policy")
    (tmp_path / "c.yaml").write_text("model: {hf: policy}\n" + DATA)
    return tmp_path / "c.yaml"


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run_command_line(app, ["eval", *arguments]) == 2
    output = capsys.readouterr().err
    assert output.startswith("error: ") and output.count("\n") == 1, output
    return output


REFUSED = [
    (["eval.samples=4"], "eval.samples = 4: at eval.temperature = 0 all answers"),
    (["eval.samples=4", "eval.temperature=1", "eval.k=[1,8]"], "eval.k = 8: pass@8 needs at least 8 answers"),
    (["eval.judged_by=builtin"], "eval.judged_by = builtin has no effect with eval.against = null"),
    (["eval.against=references", "eval.judged_by=buildin"], "eval.judged_by = buildin: no entry of reward has this name; did you mean builtin"),
    (["reward={type: judge, url: 'http://localhost:1/v1', model: m, form: pairwise}"], "reward.against = group: the judge compares"),
    (["eval.confidence=95"], "eval.confidence = 95: must be less than 1"),
    (["eval.temprature=1"], "did you mean eval.temperature"),
    (["eval.kl_to=nowhere"], "nowhere"),
    (["eval.against=policy/config.json"], "policy/config.json"),
    (["eval.max_new_tokens=96"], "model.hf = policy: its context of 96 tokens has no room for a prompt and 96 new tokens"),
    (["run.dir=."], "model.hf = policy is inside run.dir = ."),
    (["run.dir=taken", "eval.against=taken/best"], "eval.against = taken/best is inside run.dir = taken"),
    (["model={layers: 2, hidden_size: 64, ffn_size: 96, heads: 2, context_length: 96}"], "model.hf: missing"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "line"), REFUSED, ids=lambda value: value[-1] if isinstance(value, list) else None
)
def test_what_cannot_work_is_refused_in_one_line(config, capsys, settings, line):
    make_policy(Path("taken/best"))
    options = [part for setting in settings for part in ("-s", setting)]
    assert line in refused(capsys, str(config), *options, "--dry-run")


def test_references_must_be_there(config, capsys):
    Path("p.jsonl").write_text("".join(f'{{"prompt": "{i}"}}\n' for i in range(4)))
    Path("r.py").write_text("def score(prompt, completions, **columns): return [0.0] * len(completions)\n")
    options = ["data={train: p.jsonl, eval_prompts: 2}", "reward={type: function, function: 'r.py:score'}"]
    settings = [part for option in (*options, "eval.against=references") for part in ("-s", option)]
    assert "has no solution, which eval.against = references compares with" in refused(
        capsys, str(config), *settings, "--dry-run"
    )


def test_a_divergence_needs_the_same_vocabulary(config, capsys):
    make_policy(Path("other"), tokenizer="bpe", vocab_size=301)
    line = refused(capsys, str(config), "-s", "eval.kl_to=other", "--dry-run")
    assert "eval.kl_to = other: its vocabulary is not that of model.hf = policy" in line


def test_another_policy_may_have_another_tokenizer(config, tmp_path):
    make_policy(Path("other"), tokenizer="bpe", vocab_size=301)
    resolved = load_for_evaluation(config, ["eval.against=other"], resume=False)
    inputs = check_evaluation(resolved, tmp_path / "scratch")
    ours, theirs = (inputs.models[name].prompts[0] for name in ("policy", "against"))
    assert ours.text == theirs.text
    assert ours.token_ids != theirs.token_ids


def test_the_plan_is_one_model_after_the_other(config, capsys):
    assert run_command_line(app, ["eval", str(config), "-s", "eval.kl_to=policy", "--dry-run"]) == 0
    told = capsys.readouterr()
    output = told.out
    assert told.err.startswith("warning: eval.temperature = 0: kl_k1 and kl_k3 are means") and told.err.count("\n") == 1
    lines = [line for line in output.splitlines() if line.startswith("# ")]
    assert [line.split(":")[0] for line in lines] == [
        "# policy.0",
        "# kl_to.0",
        "# controller",
        "# prompts",
        "# policy",
        "# kl_to",
        "# estimate, not a measurement",
        "# generator           weights  cache  activations  fixed  total",
        *(line for line in lines if line.startswith("# a worker of ")),
        *(line.split(":")[0] for line in lines if line.startswith("# all processes together need ")),
        "# policy",
        "# kl_to",
    ]
    assert [line.split()[4] for line in lines if line.startswith("# a worker of ")] == ["policy", "kl_to"]
    assert "# prompts: 8 held out" in lines
    assert not Path("runs").exists()


def test_models_may_be_only_described(config, capsys):
    """Prompts are checked where there is a tokenizer; a start insists on the weights."""
    make_policy(Path("other"))
    for directory in ("policy", "other"):
        Path(directory, "model.safetensors").unlink()
    arguments = [str(config), "-s", "eval.against=other"]
    assert run_command_line(app, ["eval", *arguments, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "# prompts: 8 held out" in lines
    missing = [line for line in lines if line.startswith("# not checked, and needed for a start: ")]
    assert [line.split(": ")[1:3] for line in missing] == [
        ["weights", "no model.safetensors in model.hf = policy; get the whole model and name its directory"],
        ["weights", "no model.safetensors in eval.against = other; get the whole model and name its directory"],
    ]
    Path("other/tokenizer.json").unlink()
    assert run_command_line(app, ["eval", *arguments, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "# prompts: not checked" in lines and any(line.startswith("# against.0: any core: ") for line in lines)
    assert "context of 96 tokens has no room" in refused(
        capsys, *arguments, "--dry-run", "-s", "eval.max_new_tokens=96"
    )
    assert "no model.safetensors" in refused(capsys, *arguments)


def test_a_run_stands_for_its_last_policy(config):
    run = make_run(Path("runs/x"))
    resolved = load_for_evaluation(run, ["eval.against=runs/x"], resume=False)
    assert resolved.model.hf == resolved.eval.against == run / "checkpoints/final"
    assert (resolved.run.path, resolved.run.seed, resolved.model.layers) == (Path("runs/x-eval"), 7, None)
    named = load_for_evaluation(config, [f"model={{hf: {run}}}"], resume=False)
    assert (named.model.hf, named.run.path) == (run / "checkpoints/final", Path("runs/run-eval"))
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(Exception, match="it has not got that far"):
        load_for_evaluation(run, [], resume=False)


@pytest.mark.parametrize("kind", ["directory", "checkpoint"])
def test_what_is_served_has_the_weights_and_the_template(tmp_path, kind):
    source = make_policy(tmp_path / "policy", fill=0.25)
    if kind == "checkpoint":
        import_hf(source, tmp_path / "saved", tensor_parallel=1, pipeline_parallel=1, dtype=None)
        source = tmp_path / "saved"
    template = tmp_path / "template"
    make_model_template(RunConfig(model=ModelSection(hf=source, chat_template="none")), template)
    (tmp_path / "served").mkdir()
    make_servable(source, template, tmp_path / "served/policy")
    make_servable(source, template, tmp_path / "served/policy")  # again, as a resumed evaluation does
    served = tmp_path / "served/policy"
    for file in template.iterdir():
        assert (served / file.name).is_file()
    assert (served / "chat_template.jinja").read_bytes() == (template / "chat_template.jinja").read_bytes()
    assert open_weights(served).tensors == open_weights(tmp_path / "policy").tensors
    with safe_open(served / "model.safetensors", "pt") as weights:
        assert {weights.get_tensor(name).mean().item() for name in weights.keys()} == {0.25}
    assert (served / "model.safetensors").is_symlink() == (kind == "directory")


def as_interrupted(config: Path, *settings: str) -> RunConfig:
    """The directory of an evaluation that has begun."""
    resolved = load_for_evaluation(config, settings, resume=False)
    directory = resolved.run.path
    (directory / "progress").mkdir(parents=True)
    (directory / "config.yaml").write_text(dump_config(resolved))
    write_input_digests(directory, digest_evaluation(resolved, check_evaluation(resolved, directory / "served")))
    return resolved


def test_it_goes_on_with_the_same_configuration_only(config, capsys):
    as_interrupted(config, "eval.seed=1")
    arguments = [str(config), "--resume", "--dry-run"]
    assert "eval.seed = 2: the run in runs/run-eval was started with 1" in refused(
        capsys, *arguments, "-s", "eval.seed=2"
    )
    for setting in ("eval.temperature=0.5", "data.eval_prompts=4", "generator.max_new_tokens=4"):
        assert setting.partition("=")[0] in refused(capsys, *arguments, "-s", "eval.seed=1", "-s", setting)
    settings = ["-s", "eval.seed=1", "-s", "generator.start_timeout_s=900", "-s", "generator.replicas=2"]
    assert run_command_line(app, ["eval", *arguments, *settings]) == 0
    capsys.readouterr()
    assert run_command_line(app, ["eval", "runs/run-eval", "--resume", "--dry-run"]) == 0


def test_it_goes_on_with_the_same_weights_and_prompts_only(config):
    resolved = as_interrupted(config, "eval.kl_to=policy")

    def now(other: RunConfig = resolved):
        return digest_evaluation(other, load_evaluation(other, {"policy": Path("policy"), "kl_to": Path("policy")}))

    check_same_evaluation(resolved, now())
    data = resolved.data.model_copy(update={"instruction": "Be brief."})
    with pytest.raises(ConfigError, match="data: its prompts are not those of the answers"):
        check_same_evaluation(resolved, now(resolved.model_copy(update={"data": data})))
    make_policy(Path("policy"), fill=0.75)
    with pytest.raises(ConfigError, match=r"model\.hf = policy: its weights are not those of the answers"):
        check_same_evaluation(resolved, now())


def test_it_goes_on_with_the_day_of_its_answers(config, tmp_path):
    template = (Path("policy/chat_template.jinja")).read_text()
    Path("policy/chat_template.jinja").write_text("{{ strftime_now('%Y-%m-%d') }}" + template)
    resolved = as_interrupted(config)
    (resolved.run.path / "served/policy/date.txt").write_text("2026-01-02T03:04:05\n")
    inputs = check_evaluation(resolved, tmp_path / "before", goes_on=True)
    write_input_digests(resolved.run.path, digest_evaluation(resolved, inputs))
    with gather(resolved) as fleet:
        start = evaluation._decide(resolved, True, fleet, tmp_path / "scratch")
    assert start is not None and start.keeps
    assert (tmp_path / "scratch/policy/date.txt").read_text() == "2026-01-02T03:04:05\n"


def test_one_that_failed_at_its_last_file_goes_on(config, tmp_path):
    """The disk was full at pairs.jsonl, or it was killed before its summary was written."""
    resolved = as_interrupted(config)
    (resolved.run.path / "eval.json").write_text("{}")
    (resolved.run.path / "summary.json").write_text(json.dumps({"status": "failed"}))
    with gather(resolved) as fleet:
        start = evaluation._decide(resolved, True, fleet, tmp_path / "scratch")
    assert start is not None and start.keeps


def test_a_completed_one_is_shown_again(config, capsys):
    resolved = as_interrupted(config)
    one = {"mean": 0.5, "low": 0.25, "high": 0.75, "n": 8}
    content = {
        "prompts": 8,
        "samples": 1,
        "temperature": 0.0,
        "confidence": 0.95,
        "bootstrap": 10,
        "metrics": {"reward": one},
    }
    content |= dict.fromkeys(("policy", "against", "judged_by", "kl_to"))
    (resolved.run.path / "eval.json").write_text(json.dumps(content))
    (resolved.run.path / "summary.json").write_text(json.dumps({"status": "completed"}))
    assert run_command_line(app, ["eval", str(config), "--resume"]) == 0
    output = capsys.readouterr().out
    assert "runs/run-eval is completed" in output
    assert "0.75" in output
