"""`async-rlhf report`: what is on the page, and what is wrong with directories that are no runs."""

import base64
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
from reported_runs import leave_reported_run
from typer.testing import CliRunner

from megatron_async_rlhf.cli import app
from megatron_async_rlhf.config.differences import differences
from megatron_async_rlhf.config.load import load_config
from megatron_async_rlhf.errors import ConfigError, DataError
from megatron_async_rlhf.pages.rendering import packed
from megatron_async_rlhf.report.advice import advice_on
from megatron_async_rlhf.report.run import read_reported
from megatron_async_rlhf.report.samples import read_samples
from megatron_async_rlhf.report.timeline import read_timeline


def page_of(*arguments: Path | str) -> str:
    result = CliRunner().invoke(app, ["report", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return Path(re.search(r"wrote (\S+)", result.output)[1]).read_text()


def data_of(page: str) -> dict[str, Any]:
    text = re.search(r'id="data">([^<]+)<', page)[1]
    return json.loads(gzip.decompress(base64.b64decode(text)))


def test_a_run_is_reported_in_its_directory(tmp_path: Path):
    run = leave_reported_run(tmp_path / "first", steps=5, schedule={"max_staleness": 3})
    page = page_of(run)
    assert (run / "report.html").read_text() == page
    assert "completed" in page and "0.25 → 0.5" in page and "5 of 5 verified" in page
    assert "online_dpo, at most 3 steps off-policy" in page
    assert re.search(r"<td>schedule.max_staleness</td>\s*<td class=\"value\">3</td>", page)
    (of_run,) = data_of(page)["runs"]
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert of_run["curves"]["loss"]["value"] == pytest.approx([line["loss"] for line in metrics], rel=1e-5)
    assert of_run["seconds"] == pytest.approx([1, 2, 3, 4, 5])
    assert of_run["curves"]["held-out reward"] == {"step": [0, 5], "value": [0.25, 0.5]}
    assert data_of(page)["meanings"]["response_length"] == ["tokens", "mean length of a completion"]


def test_all_metrics_of_a_run_can_be_chosen(tmp_path: Path):
    run = leave_reported_run(tmp_path / "first", steps=2)
    names = {name for line in (run / "metrics.jsonl").read_text().splitlines() for name in json.loads(line)}
    (of_run,) = data_of(page_of(run))["runs"]
    assert set(of_run["curves"]) == names - {"step", "time"} | {"held-out reward", "held-out response_length"}


def test_runs_are_laid_over_each_other_and_their_differences_come_first(tmp_path: Path):
    one = leave_reported_run(tmp_path / "a/run", steps=3, learner={"learning_rate": 1e-3})
    two = leave_reported_run(tmp_path / "b/run", steps=4, learner={"learning_rate": 2e-3})
    page = page_of(one, two, one, "--out", tmp_path / "both.html")
    assert [run["name"] for run in data_of(page)["runs"]] == ["a/run", "b/run"]
    keys = re.findall(r"<td>(\w+(?:\.\w+)+)</td>", page[page.index(">Configuration<") :])
    assert set(keys[:3]) == {"learner.learning_rate", "run.dir", "schedule.steps"}


def test_a_run_that_goes_on_is_shown_as_far_as_it_is(tmp_path: Path):
    page = page_of(leave_reported_run(tmp_path / "run", steps=2, closed=False))
    assert "running, or killed" in page and "has no timeline" in page
    assert data_of(page)["runs"][0]["timeline"] is None


def test_texts_of_a_run_are_no_markup(tmp_path: Path):
    page = page_of(leave_reported_run(tmp_path / "<script>alert(1)", steps=2))
    assert "<script>alert" not in page and "<b>question" not in page
    assert data_of(page)["runs"][0]["samples"][0]["prompt"] == "<b>question</b> & 1"


@pytest.mark.parametrize(
    ("leave", "error", "message"),
    [
        (lambda run: run.mkdir(), ConfigError, "is no run's directory"),
        (lambda run: (leave_reported_run(run), (run / "metrics.jsonl").write_text("")), ConfigError, "has no steps to report; the run is"),
        (lambda run: (leave_reported_run(run), (run / "trace.json").write_text("[]")), DataError, "trace.json: is not a trace"),
        (lambda run: (leave_reported_run(run), (run / "metrics.jsonl").write_text("{\n{}\n")), DataError, "metrics.jsonl:1"),
    ],
)  # fmt: skip
def test_what_cannot_be_reported_is_said_in_a_line(tmp_path: Path, leave, error, message):
    leave(tmp_path / "run")
    with pytest.raises(error, match=re.escape(message)) as raised:
        read_reported(tmp_path / "run", "run")
    assert "\n" not in str(raised.value)


def test_timelines_are_the_slices_of_the_trace(tmp_path: Path):
    run = leave_reported_run(tmp_path / "run", steps=4, generators=2)
    timeline = read_timeline(run, 4.0)
    slices = [event for event in json.loads((run / "trace.json").read_text())["traceEvents"] if event["ph"] == "X"]
    found = []
    for lane in timeline["lanes"]:
        at = 0
        for kind, number, gap, ticks in zip(*(lane[key] for key in ("kind", "number", "gap", "ticks")), strict=True):
            at += gap
            found.append((f"{timeline['kinds'][kind]} {number}".strip(), at, ticks))
    expected = [
        (event["name"], event["ts"] // 100, (event["ts"] + event["dur"]) // 100 - event["ts"] // 100)
        for event in slices
    ]
    assert sorted(found) == sorted(expected)
    assert timeline["loop"] == [20_000, 60_000]  # after two seconds of evaluation, four of one second each
    assert {lane["process"] for lane in timeline["lanes"]} >= {
        "generator.0",
        "generator.1",
        "learner",
        "weights",
        "evaluation",
    }


def test_samples_that_are_too_many_are_thinned_the_same_prompts_everywhere(tmp_path: Path, monkeypatch):
    run = leave_reported_run(tmp_path / "run", steps=40)
    whole, notes = read_samples(run)
    assert len(whole) == 42 and notes == []
    monkeypatch.setattr("megatron_async_rlhf.report.samples._CHARACTERS", 1000)
    some, notes = read_samples(run)
    assert 0 < len(some) < 20 and "of 40 prompts of its steps" in notes[0]
    assert [entry["when"] for entry in some if entry["source"] == "held out"] == ["before", "after"]


@pytest.mark.parametrize(
    ("run", "what", "key"),
    [
        ({"generate_share": 0.9, "train_share": 0.3}, "The learner waits 70% of the time", "generator.replicas"),
        ({"generate_share": 0.4, "train_share": 0.95}, "Generators wait 60% of the time for the learner", "async-rlhf plan"),
        ({"generate_share": 0.5, "train_share": 0.5, "schedule": {"mode": "sync"}}, "each waits for the other", "schedule.mode: async"),
        ({"generate_share": 0.7, "train_share": 0.9}, "stand still for weights 30% of the time", "schedule.prompts_per_step"),
        ({"generate_share": 0.5, "train_share": 0.5}, "neither is the slower side", "schedule.max_staleness"),
        ({"generate_share": 0.5, "train_share": 0.5, "schedule": {"max_staleness": 0}}, "each waits for the other", "schedule.max_staleness: 1"),
        ({"finished": 0.5}, "50% of completions are cut off at 12 tokens", "generator.max_new_tokens"),
        ({"status": "failed"}, "The run is failed: learner.0: was killed by SIGKILL", "--resume"),
        ({"closed": False}, "The run is still running, or it was killed", "--resume"),
    ],
)  # fmt: skip
def test_what_stands_out_comes_with_what_to_do(tmp_path: Path, run, what, key):
    advice = advice_on(read_reported(leave_reported_run(tmp_path / "run", steps=10, **run), "run"))
    assert any(what in one.what and key in one.do for one in advice), advice


def test_a_run_without_faults_gets_no_advice(tmp_path: Path):
    run = leave_reported_run(tmp_path / "run", steps=10, generate_share=0.97, train_share=0.9)
    assert advice_on(read_reported(run, "run")) == []


def test_sides_that_take_turns_are_to_wait(tmp_path: Path):
    keys = {"schedule": {"mode": "sync"}, "launch": {"cores": "shared"}}
    run = leave_reported_run(tmp_path / "run", steps=10, generate_share=0.5, train_share=0.5, **keys)
    assert not any("waits for" in one.what for one in advice_on(read_reported(run, "run")))


@pytest.mark.parametrize(
    ("algorithm", "do"),
    [("online_dpo", "async-rlhf train"), ("sft", "async-rlhf sft"), ("reward_model", "begins anew, with the same command")],
)  # fmt: skip
def test_what_was_interrupted_goes_on_with_its_own_command(tmp_path: Path, algorithm: str, do: str):
    directory = leave_reported_run(tmp_path / "run", steps=10)
    summary = json.loads((directory / "summary.json").read_text())
    summary |= {"status": "interrupted", "error": None, "algorithm": algorithm}
    (directory / "summary.json").write_text(json.dumps(summary))
    first = advice_on(read_reported(directory, "run"))[0]
    assert first.what == "The run is interrupted." and do in first.do
    assert ("--resume" in first.do) == (algorithm != "reward_model")


def test_what_is_exported_of_an_earlier_step_is_no_point_at_the_last(tmp_path: Path):
    directory = leave_reported_run(tmp_path / "run", steps=10)
    summary = json.loads((directory / "summary.json").read_text())
    best = {"loss": 1.0}
    summary |= {
        "algorithm": "sft",
        "eval": {"before": {"loss": 3.0}, "step 5": best, "step 10": {"loss": 2.0}, "after": best},
    }
    (directory / "summary.json").write_text(json.dumps(summary))
    assert read_reported(directory, "run").held_out["loss"] == [(0, 3.0), (5, 1.0), (10, 2.0)]


def test_samples_of_the_first_version_are_of_the_steps_that_curves_have(tmp_path: Path):
    directory = leave_reported_run(tmp_path / "run", steps=3)
    lines = [json.loads(line) for line in (directory / "samples.jsonl").read_text().splitlines()]
    (directory / "samples.jsonl").write_text(
        "".join(json.dumps(line | {"step": line["step"] - 1}) + "\n" for line in lines)
    )
    whole, _ = read_samples(directory)
    assert [entry["when"] for entry in whole if entry["source"] == "training"] == ["step 1", "step 2", "step 3"]


def test_only_what_is_no_default_is_a_difference(tmp_path: Path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "{model: {hf: some/model}, algorithm: {type: grpo, samples_per_prompt: 4, kl: {coefficient: 0.5}}, schedule: {steps: 7}, "
        "data: {train: x.jsonl}, reward: [{type: length, name: short, weight: 2, per_token: 0.5}]}"
    )
    found = differences(load_config(path))
    assert found == {
        "model.hf": "some/model", "schedule.steps": 7, "algorithm.type": "grpo", "algorithm.samples_per_prompt": 4,
        "algorithm.kl.coefficient": 0.5, "data.train": "x.jsonl", "reward.0.type": "length", "reward.0.name": "short",
        "reward.0.weight": 2, "reward.0.per_token": 0.5,
    }  # fmt: skip


def test_a_section_that_is_there_with_its_defaults_is_a_difference(tmp_path: Path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "{model: {hf: m}, run: {device: cuda}, learner: {precision: bf16, fp8: {}}, weights: {transport: nccl}}"
    )
    found = differences(load_config(path))
    assert found["learner.fp8"] == {"recipe": "tensorwise", "bf16_layers": 0}
    path.write_text("{model: {hf: m}, learner: {}}")
    assert not any(key.startswith("learner") for key in differences(load_config(path)))


def test_the_quickstart_differs_in_what_its_file_says():
    path = Path("examples/quickstart.yaml")
    import yaml

    said = {f"{section}.{key}" for section, keys in yaml.safe_load(path.read_text()).items() for key in keys}
    found = set(differences(load_config(path)))
    assert found - {"algorithm.type", "reward.type"} <= said


def test_numbers_that_are_none_are_null_on_a_page():
    assert json.loads(gzip.decompress(base64.b64decode(packed({"a": [float("nan"), float("inf"), 1.5]})))) == {
        "a": [None, None, 1.5]
    }
