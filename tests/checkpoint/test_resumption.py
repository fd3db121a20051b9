"""What `train --resume` finds in a run's directory, and what it refuses before any process starts."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import msgspec
import pytest
import torch
import yaml
from hf_models import make_hf_model

from megatron_async_rlhf.checkpoint.run_checkpoints import RunCheckpoints, has_own_reference
from megatron_async_rlhf.checkpoint.run_state import RunState, encode_run_state, read_run_state
from megatron_async_rlhf.cli import app
from megatron_async_rlhf.config.load import dump_config, load_config
from megatron_async_rlhf.converter.convert import import_hf
from megatron_async_rlhf.errors import CheckpointError, ConfigError, DataError
from megatron_async_rlhf.formats.file_digests import write_digests
from megatron_async_rlhf.jobs.inputs import load_run_inputs, make_model_template
from megatron_async_rlhf.launch.input_digests import digest_inputs, write_input_digests
from megatron_async_rlhf.launch.resume import find_resumption
from megatron_async_rlhf.launch.run_directory import reopen_run_directory
from megatron_async_rlhf.scheduler.scoring import ScoredGroup
from megatron_async_rlhf.scheduler.state import ControllerState, ReadyGroup
from megatron_async_rlhf.telemetry.files import read_lines
from megatron_async_rlhf.telemetry.summary import RunTotals
from megatron_async_rlhf.types import Prompt, RolloutGroup
from megatron_async_rlhf.usage import run_command_line

CONFIG = {
    "model": {"layers": 2, "hidden_size": 64, "ffn_size": 96, "heads": 2, "context_length": 96},
    "warm_start": {"steps": 3},
    "generator": {"max_new_tokens": 12},
    "schedule": {"steps": 10},
    "data": {"train_prompts": 32, "eval_prompts": 8},
}
TOTALS = RunTotals(
    mode="async",
    algorithm="online_dpo",
    staleness_bound=1,
    steps=4,
    staleness=Counter([0, 1, 1]),
    evaluation={"before": {}, "step 2": {}},
)


def run_state(version: int, *waiting: int) -> RunState:
    prompt = Prompt(index=0, text="", token_ids=[1], reference={})
    scored = ScoredGroup(group=RolloutGroup(prompt=prompt, completions=[], rewards=[]), facts=[])
    ready = [ReadyGroup(index=i, version=version, scored=scored, generate_s=1.0) for i in waiting]
    admitted = max(waiting, default=0) + 1
    controller = ControllerState(version=version, admitted=admitted, ready=ready, evaluated=2)
    return RunState(controller=controller, totals=TOTALS, metric="reward", scores={version: 0.5})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that died after step 4; its checkpoints hold another, smaller model, which nobody looks at here."""
    root = tmp_path_factory.mktemp("saved")
    model = make_hf_model(root / "hf", "llama")
    run = root / "run"
    (run / "checkpoints").mkdir(parents=True)
    for name in ("step_000002", "step_000004", "reference"):
        import_hf(model.directory, run / "checkpoints" / name, tensor_parallel=1, pipeline_parallel=1, dtype=None)
    for version in (2, 4):
        directory = run / f"checkpoints/step_{version:06d}"
        torch.save({"common": {"version": version, "steps": version, "ranks": 1}}, directory / "common.pt")
        (directory / "run_state.msgpack").write_bytes(encode_run_state(run_state(version, version)))
        (directory / "digests.json").unlink()
        write_digests(directory)
    for file, key, values in (("metrics", "step", range(1, 7)), ("samples", "step", [1, 1, 4, 5, 6])):
        (run / f"{file}.jsonl").write_text("".join(json.dumps({key: value}) + "\n" for value in values) + '{"st')
    evaluations = "before", "step 2", "step 4", "after"
    (run / "evaluations.jsonl").write_text("".join(json.dumps({"when": when}) + "\n" for when in evaluations))
    (run / "rollouts").mkdir()
    for step in range(1, 7):
        (run / f"rollouts/step_{step:06d}.msgpack").write_bytes(b"")
    (run / "summary.json").write_text('{"status": "failed", "steps": 6}')
    return run


class Found:
    """A copy of that run, and the config it is to continue with."""

    def __init__(self, directory: Path, saved: Path) -> None:
        self.run = directory / "run"
        shutil.copytree(saved, self.run)
        self.places = RunCheckpoints(self.run)
        self.file = directory / "config.yaml"
        self.file.write_text(yaml.safe_dump(CONFIG))
        self.earlier = self.config()
        (self.run / "config.yaml").write_text(dump_config(self.earlier))

    def config(self, *overrides: str):
        return load_config(self.file, [f"run.dir={self.run}", *overrides])

    def resume(self, *overrides: str):
        config = self.config(*overrides)
        return find_resumption(
            config, steps=config.schedule.steps, key="schedule.steps", has_reference=has_own_reference(config)
        )


@pytest.fixture
def found(tmp_path: Path, saved: Path) -> Found:
    return Found(tmp_path, saved)


def test_the_newest_checkpoint_is_found(found: Found):
    resumption = found.resume()
    assert (resumption.version, resumption.finished) == (4, False)
    assert resumption.note == f"continuing from {found.places.path(4)}"


def test_what_is_incomplete_is_no_checkpoint(found: Found):
    found.places.path(4).rename(found.places.partial(found.places.path(4)))
    (found.run / "checkpoints/step_000009.old").mkdir()
    (found.run / "checkpoints/final").mkdir()
    assert found.places.versions() == [2]
    assert found.resume().version == 2


def test_without_a_run_it_starts_from_the_beginning(found: Found, tmp_path: Path):
    resumption = found.resume(f"run.dir={tmp_path / 'new'}")
    assert resumption.note == f"{tmp_path / 'new'} holds no run yet: starting from the beginning"
    assert (resumption.version, resumption.finished) == (None, False)


def test_without_a_checkpoint_it_starts_from_the_beginning(found: Found):
    shutil.rmtree(found.run / "checkpoints")
    resumption = found.resume("model.layers=4")  # another model does no harm then
    assert resumption.note == f"{found.run} has no checkpoint yet: starting from the beginning"
    assert resumption.version is None


def test_a_completed_run_has_nothing_to_do_unless_there_are_more_steps(found: Found):
    (found.run / "summary.json").write_text('{"status": "completed", "steps": 10}')
    assert found.resume().finished
    assert found.resume().note == f"{found.run} is completed: all 10 steps are made"
    assert found.resume("schedule.steps=12").version == 4


@pytest.mark.parametrize("summary", ['{"status": "completed", "steps": null}', "[]", '{"status": 3}', ""])
def test_a_damaged_summary_says_nothing(found: Found, summary: str):
    (found.run / "summary.json").write_text(summary)
    assert found.resume().version == 4


def test_a_completed_run_without_a_checkpoint_does_not_start_over(found: Found):
    (found.run / "summary.json").write_text('{"status": "completed", "steps": 10}')
    shutil.rmtree(found.run / "checkpoints")
    assert found.resume().finished
    with pytest.raises(ConfigError) as error:
        found.resume("schedule.steps=12")
    message = str(error.value)
    assert message.startswith(f"schedule.steps = 12: {found.run} is completed after 10 steps and has no checkpoint")
    assert "checkpoint.every_steps" in message and "\n" not in message


@pytest.mark.parametrize(
    ("override", "before"),
    [
        ("run.seed=1", "0"),
        ("model.layers=4", "2"),
        ("model.vocab_size=300", "null"),
        ("warm_start.steps=0", "3"),
        ("data.train_prompts=64", "32"),
        ("algorithm.beta=0.5", "0.1"),
        ("generator.temperature=0.5", "0.7"),
        ("learner.precision=bf16", "fp32"),
        ("schedule.mode=sync", "async"),
        ("schedule.max_staleness=2", "1"),
        ("schedule.prompts_per_step=8", "32"),
    ],
)
def test_what_must_not_change(found: Found, override: str, before: str):
    key, _, value = override.partition("=")
    extra = ["model.tokenizer=bpe"] if key == "model.vocab_size" else []
    with pytest.raises(ConfigError) as refused:
        found.resume(override, *extra)
    if extra:
        key, value, before = "model.tokenizer", "bpe", "null"
    assert str(refused.value) == (
        f"{key} = {value}: the run in {found.run} was started with {before}; "
        "set that again, or start another run without --resume"
    )


@pytest.mark.parametrize(
    "override",
    [
        "learner.tensor_parallel=2", "learner.ranks=2", "learner.learning_rate=1e-4", "learner.micro_batch_tokens=8192",
        "generator.replicas=2", "schedule.steps=4", "checkpoint.every_steps=7", "telemetry.samples_per_step=0",
        "weights.verify=first", "launch.pin_cores=false", "run.name=another",
    ],
)  # fmt: skip
def test_what_may_change(found: Found, override: str):
    assert found.resume(override).version == 4


def test_fewer_steps_than_were_made_are_refused(found: Found):
    with pytest.raises(ConfigError, match=r"schedule.steps = 3 is below the 4 steps of .*step_000004; raise it"):
        found.resume("schedule.steps=3")


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: cut(c / "__0_0.distcp"), "step_000004/__0_0.distcp is"),
        (lambda c: (c / "__0_0.distcp").unlink(), "step_000004/__0_0.distcp is missing"),
        (lambda c: (c / ".metadata").unlink(), "step_000004 has no .metadata"),
        (lambda c: cut(c / ".metadata"), "step_000004/.metadata cannot be read"),
        (lambda c: (c / "metadata.json").unlink(), "step_000004/metadata.json cannot be read"),
        (lambda c: (c / "common.pt").unlink(), "step_000004/common.pt cannot be read"),
        (lambda c: cut(c / "common.pt"), "step_000004/common.pt cannot be read"),
        (lambda c: shutil.copy(c.parent / "step_000002/common.pt", c), "is of version 2, the controller's state of 4"),
        (lambda c: (c / "run_state.msgpack").unlink(), "step_000004/run_state.msgpack cannot be read"),
        (lambda c: cut(c / "run_state.msgpack"), "step_000004/run_state.msgpack is broken or from another release"),
        (lambda c: (c / "run_state.msgpack").write_bytes(b"\x80"), "is broken or from another release"),
        # Version 0.1.0 counted steps from 0 in the files beside it.
        (
            lambda c: (c / "run_state.msgpack").write_bytes(
                encode_run_state(msgspec.structs.replace(run_state(4, 4), format=2))
            ),
            "is from another release (format 2, not 3)",
        ),
        (
            lambda c: (c / "run_state.msgpack").write_bytes(encode_run_state(run_state(4, 6, 6))),
            "its groups do not add up",
        ),
    ],
)
def test_a_broken_checkpoint_of_an_earlier_version_is_refused_in_one_line(found: Found, damage, message: str):
    (found.places.path(4) / "digests.json").unlink()
    damage(found.places.path(4))
    with pytest.raises(CheckpointError) as refused:
        found.resume()
    (line,) = str(refused.value).splitlines()
    assert message in line
    assert line.endswith(f"; delete {found.places.path(4)} to continue from step 2")
    shutil.rmtree(found.places.path(2))
    with pytest.raises(CheckpointError, match="; run without --resume$"):
        found.resume()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "reference/metadata.json cannot be read"),
        (lambda reference: cut(reference / "__0_0.distcp"), "reference/__0_0.distcp is"),
    ],
)
def test_a_broken_reference_is_refused_if_it_is_nowhere_else(found: Found, make_model, damage, message: str):
    (found.places.reference / "digests.json").unlink()
    damage(found.places.reference)
    with pytest.raises(CheckpointError, match=f"{message}.*; run without --resume$"):
        found.resume()
    found.file.write_text(
        yaml.safe_dump(CONFIG | {"model": {"hf": str(make_model("llama").directory)}, "warm_start": {}})
    )
    (found.run / "config.yaml").write_text(dump_config(found.config()))
    assert found.resume().version == 4


def test_an_older_checkpoint_is_named_only_if_it_is_whole(found: Found):
    flip(found.places.path(4) / "__0_0.distcp", 1000)
    with pytest.raises(
        CheckpointError,
        match=f"step_000004/__0_0.distcp is not what was written: its digest differs; delete {found.places.path(4)} to continue from step 2$",
    ):
        found.resume()
    flip(found.places.path(2) / "common.pt", 10)
    with pytest.raises(CheckpointError, match="step_000004/__0_0.distcp is .*; run without --resume$"):
        found.resume()


def test_what_is_newer_than_where_a_run_goes_back_to_is_saved_again(found: Found):
    flip(found.places.path(4) / "common.pt", 10)
    reopen_run_directory(found.config(), 2)
    assert found.places.versions() == [2]
    assert [line["step"] for line in read_lines(found.run / "metrics.jsonl")] == [1, 2]


def test_a_run_says_which_of_its_checkpoints_are_whole(found: Found, capsys):
    assert run_command_line(app, ["verify-checkpoint", str(found.run)]) == 0
    assert capsys.readouterr().out.count("all as written") == 3
    flip(found.places.path(2) / "metadata.json", 3)
    (found.places.path(4) / "digests.json").unlink()
    assert run_command_line(app, ["verify-checkpoint", str(found.run)]) == 1
    out = capsys.readouterr().out
    assert "broken: " in out and "step_000002/metadata.json is not what was written" in out
    assert "step_000004: has no digests: an earlier version wrote it" in out
    assert run_command_line(app, ["verify-checkpoint", str(found.run / "checkpoints/reference")]) == 0
    assert run_command_line(app, ["verify-checkpoint", str(found.file.parent)]) == 2
    assert "has no checkpoints" in capsys.readouterr().err


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << place % 8
    path.write_bytes(content)


def train(found: Found, *flags: str) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "megatron_async_rlhf",
        "train",
        str(found.file),
        "-s",
        f"run.dir={found.run}",
        *flags,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def contents(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_refusal_changes_nothing(found: Found):
    cut(found.places.path(4) / "__0_0.distcp")
    before = contents(found.run)
    result = train(found, "--resume")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and "step_000004/__0_0.distcp" in line
    assert contents(found.run) == before


@pytest.mark.parametrize("flags", [["--resume"], ["--resume", "--dry-run"]], ids=" ".join)
def test_other_prompts_than_it_was_started_with_are_refused(found: Found, flags: list[str], capsys):
    make_model_template(found.earlier, found.run / "model")
    other = found.config("data.train_prompts=31")
    write_input_digests(found.run, digest_inputs(other, load_run_inputs(other, found.run / "model")))
    before = contents(found.run)
    assert run_command_line(app, ["train", str(found.file), "-s", f"run.dir={found.run}", *flags]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
    assert line.startswith("error: data.train = builtin: its prompts are not those that the run in ")
    assert "there were 31, there are 32" in line and line.endswith("start another run without --resume")
    assert contents(found.run) == before


def test_a_dry_run_shows_what_it_would_go_on_from_and_changes_nothing(found: Found):
    make_model_template(found.earlier, found.run / "model")
    found.places.partial(found.places.path(6)).mkdir()
    before = contents(found.run)
    result = train(found, "--resume", "--dry-run")
    assert result.returncode == 0, result.stderr
    assert f"continuing from {found.places.path(4)}" in result.stdout
    assert "learner.0" in result.stdout
    assert contents(found.run) == before
    assert found.places.partial(found.places.path(6)).is_dir()


def test_what_came_after_the_checkpoint_is_cut_off(found: Found):
    left_over = found.places.partial(found.places.path(6))
    (left_over / "hf").mkdir(parents=True)
    now = found.config("schedule.steps=20")
    assert reopen_run_directory(now, 4) == found.run
    steps = {
        file: [json.loads(line)["step"] for line in (found.run / file).read_text().splitlines()]
        for file in ("metrics.jsonl", "samples.jsonl")
    }
    assert steps == {"metrics.jsonl": [1, 2, 3, 4], "samples.jsonl": [1, 1, 4]}
    evaluations = '{"when": "before"}\n{"when": "step 2"}\n'  # the one of step 4 had not ended then
    assert (found.run / "evaluations.jsonl").read_text() == evaluations
    rollouts = [path.name for path in sorted((found.run / "rollouts").iterdir())]
    assert rollouts == [f"step_{step:06d}.msgpack" for step in range(1, 5)]
    assert load_config(found.run / "config.yaml") == now
    assert not left_over.exists()
    assert found.places.versions() == [2, 4]


TEXT = "a\u2028b\u2029c\x85d\ve\ff\x1cg\x1dh\x1ei"  # at each of which `str.splitlines` would cut


def test_steps_of_version_0_1_0_are_numbered_from_1(found: Found):
    for name in ("metrics.jsonl", "samples.jsonl"):
        lines = [json.dumps({"step": step, "prompt": TEXT}, ensure_ascii=False) + "\n" for step in range(6)]
        (found.run / name).write_text("".join(lines), encoding="utf-8")
    reopen_run_directory(found.config(), 4)
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert read_lines(found.run / name) == [{"step": step, "prompt": TEXT} for step in (1, 2, 3, 4)]


def test_text_with_any_separator_is_kept(found: Found):
    samples = [{"step": step, "prompt": TEXT} for step in (1, 3, 5)]
    evaluations = [{"when": when, "completion": TEXT} for when in ("before", "after")]
    for name, lines in (("samples.jsonl", samples), ("evaluations.jsonl", evaluations)):
        (found.run / name).write_text(
            "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8"
        )
    reopen_run_directory(found.config(), 4)
    assert read_lines(found.run / "samples.jsonl") == samples[:2]
    assert read_lines(found.run / "evaluations.jsonl") == evaluations[:1]


@pytest.mark.parametrize("line", ['{"step": 1, "rew', '{"other": 1}', "\0\0\0"], ids=repr)
def test_a_line_that_the_run_did_not_write_is_named_before_anything_is_changed(found: Found, line: str):
    (found.run / "samples.jsonl").write_text(f'{{"step": 0}}\n{line}\n{{"step": 3}}\n')
    before = contents(found.run)
    with pytest.raises(DataError, match=r"samples\.jsonl:2: "):
        reopen_run_directory(found.config(), 4)
    assert contents(found.run) == before


def test_a_state_comes_back_as_it_was(found: Found):
    state = read_run_state(found.places.path(4))
    assert state == run_state(4, 4)
    assert state.totals.staleness.total() == 3
    assert state.controller.admitted == 5


@pytest.mark.parametrize(
    ("keep_last", "best", "kept"),
    [
        (None, None, [1, 2, 3, 4]),
        (1, None, [4]),
        (2, None, [3, 4]),
        (1, 2, [2, 4]),
        (2, 4, [3, 4]),
        (9, 1, [1, 2, 3, 4]),
    ],
)
def test_what_is_kept(tmp_path: Path, keep_last: int | None, best: int | None, kept: list[int]):
    places = RunCheckpoints(tmp_path)
    for version in range(1, 5):
        (places.path(version) / "hf").mkdir(parents=True)
    places.reference.mkdir()
    places.prune(keep_last, best)
    assert places.versions() == kept
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {
        "reference", *(f"step_{version:06d}" for version in kept)
    }  # fmt: skip


def test_the_last_policy_of_a_run(found: Found):
    """What was exported if it is completed, else the newest checkpoint; never what is being written."""
    from megatron_async_rlhf.converter.sources import resolve

    assert resolve(found.run) == found.places.path(4)
    (found.run / "checkpoints/final").mkdir()
    assert resolve(found.run) == found.places.path(4)
    (found.run / "summary.json").write_text('{"status": "completed"}')
    assert resolve(found.run) == found.run / "checkpoints/final"
    (found.run / "summary.json").write_text('{"status": "interru')
    for version in (2, 4):
        found.places.path(version).rename(found.places.partial(found.places.path(version)))
    assert resolve(found.run) == found.run / "checkpoints/final"
    (found.run / "checkpoints/final").rmdir()
    with pytest.raises(CheckpointError, match="without checkpoints/final and without a checkpoint"):
        resolve(found.run)
