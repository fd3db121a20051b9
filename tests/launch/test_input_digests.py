"""A run that is resumed, or done again, reads what it was started with; otherwise it is refused before anything starts."""

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from megatron_async_rlhf.cli import app
from megatron_async_rlhf.config.load import dump_config, load_config
from megatron_async_rlhf.config.resume import check_same_run
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.jobs.inputs import RunInputs, load_run_inputs, make_model_template
from megatron_async_rlhf.launch import input_digests
from megatron_async_rlhf.launch.input_digests import InputDigests, check_same_inputs, digest_inputs, write_input_digests
from megatron_async_rlhf.usage import run_command_line

CONFIG = """
model: {layers: 2, hidden_size: 64, ffn_size: 96, heads: 2, context_length: 96}
generator: {max_new_tokens: 12}
data: {train: t.jsonl, eval: e.jsonl, solution_field: answer, eval_prompts: 2, train_prompts: 6}
reward: {type: gsm8k}
schedule: {record: true}
"""


def rows(start: int, count: int) -> list[dict]:
    return [{"prompt": f"{n} + 1?", "answer": f"#### {n + 1}"} for n in range(start, start + count)]


def write(path: str, records: list[dict]) -> None:
    Path(path).write_text("".join(json.dumps(record) + "\n" for record in records))


class Run:
    """A run that has begun, and the config it is to continue with."""

    def __init__(self) -> None:
        write("t.jsonl", rows(0, 6))
        write("e.jsonl", rows(50, 2))
        Path("c.yaml").write_text(CONFIG)
        self.directory = Path("runs/run")
        make_model_template(self.config(), self.directory / "model")
        (self.directory / "config.yaml").write_text(dump_config(self.config()))
        write_input_digests(self.directory, self.now())

    def config(self, *overrides: str) -> RunConfig:
        return load_config(Path("c.yaml"), overrides)

    def run_inputs(self) -> RunInputs:
        return load_run_inputs(self.config(), self.directory / "model")

    def now(self) -> InputDigests:
        return digest_inputs(self.config(), self.run_inputs())

    def check(self, **keywords: bool) -> list[str]:
        return check_same_inputs(self.directory, self.config(), self.now(), **keywords)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    return Run()


def test_the_same_inputs_are_no_matter(run: Run):
    assert run.check() == []
    write("t.jsonl", rows(0, 9))  # data.train_prompts is 6: nobody reads those behind
    Path("e.jsonl").write_text(Path("e.jsonl").read_text().replace('"prompt"', '"id": 7, "prompt"') + "\n\n")
    assert run.check() == []


OTHERS: dict[str, tuple[Callable[[], None], str]] = {
    "texts": (lambda: write("t.jsonl", [{**rows(7, 1)[0]}, *rows(1, 5)]), "data.train = t.jsonl: .*the texts differ"),
    "order": (lambda: write("t.jsonl", rows(0, 6)[::-1]), "data.train = t.jsonl: .*the texts differ"),
    "fewer": (lambda: write("t.jsonl", rows(0, 5)), "data.train = t.jsonl: .*there were 6, there are 5"),
    "solutions": (
        lambda: write("t.jsonl", [{"prompt": "0 + 1?", "answer": "#### 7"}, *rows(1, 5)]),
        "data.train = t.jsonl: .*the solutions differ",
    ),
    "eval": (lambda: write("e.jsonl", rows(51, 2)), "data.eval = e.jsonl: .*the texts differ"),
    "template": (
        lambda: Path("runs/run/model/chat_template.jinja").write_text("{{ messages[0].content }}!"),
        "data.train = t.jsonl: .*the tokens .the template or tokenizer. differ",
    ),
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_inputs_are_refused(run: Run, what: str):
    change, message = OTHERS[what]
    change()
    with pytest.raises(
        ConfigError, match=f"{message}; put back what was there, or start another run without --resume$"
    ):
        run.check()


def test_a_run_of_an_earlier_version_goes_on_with_a_warning(run: Run):
    (run.directory / "inputs.json").unlink()
    (line,) = run.check()
    assert line.startswith(f"{run.directory} has no inputs.json") and "cannot be checked" in line
    (run.directory / "inputs.json").write_text("{")
    with pytest.raises(ConfigError, match="inputs.json cannot be read .*; delete it to continue without comparing"):
        run.check()


def test_a_run_from_before_columns_were_recognised_goes_on(run: Run):
    """Its resolved configuration has `prompt_field: prompt`, which was the default."""
    earlier = run.config("data.prompt_field=prompt")
    check_same_run(earlier, run.config("data.prompt_field=null"), contents_are_compared=True)
    with pytest.raises(ConfigError, match="data.prompt_field = null: the run in runs/run was started with prompt"):
        check_same_run(earlier, run.config("data.prompt_field=null"))


def test_the_same_data_may_lie_elsewhere(run: Run):
    earlier = run.config()
    Path("moved").mkdir()
    for name in ("t.jsonl", "e.jsonl"):
        Path(name).rename(Path("moved") / name)
    now = run.config("data.train=moved/t.jsonl", "data.eval=moved/e.jsonl")
    check_same_run(earlier, now, contents_are_compared=True)
    assert (
        check_same_inputs(run.directory, now, digest_inputs(now, load_run_inputs(now, run.directory / "model"))) == []
    )
    with pytest.raises(ConfigError, match="data.train = moved/t.jsonl: the run in runs/run was started with t.jsonl"):
        check_same_run(earlier, now)  # of an earlier version
    with pytest.raises(ConfigError, match="data.prompt_field = x: "):
        check_same_run(earlier, run.config("data.prompt_field=x"), contents_are_compared=True)
    with pytest.raises(ConfigError, match="data.eval = null: "):
        check_same_run(earlier, run.config("data.eval=null"), contents_are_compared=True)


def test_other_code_of_the_reward_is_said(run: Run):
    before = msgspec.structs.replace(run.now(), reward="another")
    write_input_digests(run.directory, before)
    assert run.check() == [f"reward.type = gsm8k: its code has changed since the run in {run.directory} was started"]


def test_weights_that_are_read_again_must_be_the_same(run: Run):
    """The reference policy's, unless the run keeps its own; and all of them where it starts over, as a replay does."""
    model = Path("hf")
    model.mkdir()
    weights = bytearray(range(256)) * 4096
    (model / "model.safetensors").write_bytes(weights)
    config = run.config()
    from_hf = config.model_copy(update={"model": config.model.model_copy(update={"hf": model})})
    run_inputs = run.run_inputs()
    write_input_digests(run.directory, digest_inputs(from_hf, run_inputs))
    assert check_same_inputs(run.directory, from_hf, digest_inputs(from_hf, run_inputs)) == []
    changed = bytes(byte ^ 1 for byte in weights)
    assert len(changed) == len(weights)
    (model / "model.safetensors").write_bytes(changed)
    now = digest_inputs(from_hf, run_inputs)
    with pytest.raises(ConfigError, match="model.hf = hf: its weights are not those that the run"):
        check_same_inputs(run.directory, from_hf, now)
    own = config.model_copy(update={"warm_start": config.warm_start.model_copy(update={"steps": 5})})
    own = own.model_copy(update={"model": from_hf.model})
    assert check_same_inputs(run.directory, own, now) == []  # its reference is in its checkpoints
    with pytest.raises(ConfigError, match="start another run$"):
        check_same_inputs(run.directory, own, now, starts_over=True)


def test_a_small_file_is_read_whole(tmp_path: Path):
    for number in range(40):
        content = bytearray(40)
        content[number] = 1
        (tmp_path / "a.safetensors").write_bytes(content)
        digest = input_digests.digest_weights(tmp_path)
        (tmp_path / f"{digest}.seen").touch()
    assert len(list(tmp_path.glob("*.seen"))) == 40


def test_a_sweep_goes_on_with_the_same_data_only(run: Run, capsys: pytest.CaptureFixture):
    """The points that are there already have seen others."""
    Path("sweep.yaml").write_text(CONFIG + "run: {name: sweep}\nsweep: {axes: {seed: {run.seed: [0, 1]}}}\n")
    assert run_command_line(app, ["sweep", "sweep.yaml", "--dry-run"]) == 0
    point = load_config(Path("c.yaml"), ["run.dir=runs/sweep/seed0"])
    make_model_template(point, Path("runs/sweep/seed0/model"))
    write_input_digests(Path("runs/sweep/seed0"), run.now())
    held_out = ["sweep", "sweep.yaml", "--dry-run", "-s", "data.eval=null", "-s", "data.train_prompts=null"]
    for seed in (0, 1):  # each draws others
        own = load_config(Path("c.yaml"), ["data.eval=null", "data.train_prompts=null", f"run.seed={seed}"])
        directory = Path(f"runs/sweep/seed{seed}")
        make_model_template(own, directory / "model")
        write_input_digests(directory, digest_inputs(own, load_run_inputs(own, directory / "model")))
    assert run_command_line(app, held_out) == 0, capsys.readouterr().err
    (Path("runs/sweep/seed1") / "inputs.json").unlink()
    write_input_digests(Path("runs/sweep/seed0"), run.now())
    assert run_command_line(app, ["sweep", "sweep.yaml", "--dry-run"]) == 0
    write("e.jsonl", rows(60, 2))
    capsys.readouterr()
    assert run_command_line(app, ["sweep", "sweep.yaml", "--dry-run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: data.eval = e.jsonl: its prompts are not those that the run in runs/sweep/seed0 was")


def test_a_replay_of_other_data_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    from megatron_async_rlhf.scheduler.recording import RolloutLog

    monkeypatch.setattr(RolloutLog, "read", lambda self, end: iter([None]))  # one recorded rollout
    write("t.jsonl", rows(1, 6))
    assert run_command_line(app, ["replay", "runs/run"]) == 2
    # There may be a warning before it, of the variables of this shell that are ignored.
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: data.train = t.jsonl: its prompts are not those") and line.endswith("another run")
    assert not Path("runs/run.replay").exists()
