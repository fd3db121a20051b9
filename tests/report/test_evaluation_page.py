"""The page of an evaluation."""

import base64
import gzip
import json
import re
from pathlib import Path

import pytest
from browser import look, needs_chromium
from reported_runs import leave_reported_run
from typer.testing import CliRunner

from megatron_async_rlhf.cli import app
from megatron_async_rlhf.usage import run_command_line

INTERVAL = {"mean": 0.625, "low": 0.5, "high": 0.75}


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    directory = tmp_path / "evaluated"
    directory.mkdir()
    content = {
        "schema": 1, "policy": "runs/policy", "against": "runs/sft", "judged_by": "kept", "kl_to": None, "prompts": 2, "samples": 1,
        "temperature": 0.7, "max_new_tokens": 64, "confidence": 0.95, "bootstrap": 10000, "seed": 0,
        "metrics": {"reward": INTERVAL}, "against_metrics": {"reward": INTERVAL}, "difference": {"reward": INTERVAL},
        "wins": {"win_rate": INTERVAL, "length_controlled_win_rate": None, "won": 1, "tied": 1, "lost": 0},
        "versions": {"torch": "2.13.0"},
    }  # fmt: skip
    (directory / "eval.json").write_text(json.dumps(content))
    lines = [
        {"prompt": f"<i>question</i> {n}", "index": n, "policy": [answer("the new answer", 1.0)], "against": [answer("the old answer", 0.0)]}
        for n in range(2)
    ]  # fmt: skip
    (directory / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def answer(text: str, reward: float) -> dict:
    return {
        "text": text,
        "finished": True,
        "response_length": 3,
        "reward": reward,
        "scores": {"reward/kept": reward},
        "logprob": None,
    }


def test_estimates_and_answers_are_on_it(evaluation: Path):
    result = CliRunner().invoke(app, ["report", str(evaluation)])
    assert result.exit_code == 0, result.output
    page = (evaluation / "report.html").read_text()
    text = " ".join(re.sub(r"<[^>]+>", " ", page).split())
    assert "The policy wins 62.5 % of the comparisons (50.0 to 75.0 %, ties count half): 1 won, 1 tied, 0 lost." in text
    assert "policy - against reward" not in text and "reward 0.625 0.5 0.75" in text and "judged_by: kept" in text
    data = json.loads(gzip.decompress(base64.b64decode(re.search(r'id="data">([^<]+)<', page)[1])))
    entries = data["runs"][0]["samples"]
    assert [(entry["when"], entry["completions"]) for entry in entries[:2]] == [
        ("policy", ["the new answer"]),
        ("against", ["the old answer"]),
    ]


def test_an_evaluation_is_given_alone(evaluation: Path, tmp_path: Path, capsys):
    run = leave_reported_run(tmp_path / "run", steps=2)
    assert run_command_line(app, ["report", str(run), str(evaluation)]) == 2
    assert "is an evaluation, which has a page of its own; give it alone" in capsys.readouterr().err


def test_what_is_no_evaluation_is_said_in_a_line(evaluation: Path, capsys):
    (evaluation / "eval.json").write_text("{}")
    assert run_command_line(app, ["report", str(evaluation)]) == 2
    error = capsys.readouterr().err
    assert "eval.json: is not what async-rlhf eval writes" in error and error.count("\n") == 1


@needs_chromium
@pytest.mark.parametrize("width", [1440, 390])
def test_both_sides_are_compared_word_by_word(evaluation: Path, width: int):
    assert CliRunner().invoke(app, ["report", str(evaluation)]).exit_code == 0
    compare = "(() => { const e = document.querySelector('.sample select'); e.value = '0'; e.dispatchEvent(new Event('change')); })()"
    marked = "[...document.querySelectorAll('.sample ins, .sample del')].map((e) => e.tagName + ' ' + e.textContent.trim()).join(', ')"
    seen = look(evaluation / "report.html", width=width, expressions=[compare, marked])
    assert (seen.said, seen.asked, seen.overflow, seen.results[1]) == ([], [], 0, "DEL old, INS new")
