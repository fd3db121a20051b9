"""docs/tutorial.md: its files are made and its commands run as they are printed, in order, in an empty directory."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from doc_blocks import ROOT, blocks, commands, run_shell, write_files
from tiny_reward_model import make_reward_model

from megatron_async_rlhf.cli import app
from megatron_async_rlhf.launch.recipe import load_recipe
from megatron_async_rlhf.usage import run_command_line

PAGE = "docs/tutorial.md"
LIMIT_S = 500  # of one block; the pipeline takes the longest
LEFT_OUT = ("curl", "kill", "head", "export")  # of the check without processes


@pytest.mark.slow
def test_every_file_and_command_is_as_the_program_wants_it(tmp_path: Path, monkeypatch, capsys):
    """Without starting anything: every command of ours is a dry run, with stand-ins for what earlier ones would have made."""
    monkeypatch.chdir(tmp_path)
    write_files(PAGE, tmp_path)
    dry = 0
    for words in commands(PAGE):
        match words:
            case ["python", name, *_] if name.startswith("make_"):
                run_shell(shlex.join(words), tmp_path, LIMIT_S)
            case ["python", name] if name.endswith(".py"):
                compile(Path(name).read_text(encoding="utf-8"), name, "exec")
            case ["async-rlhf", "pipeline", recipe]:
                commands_of = [stage.command for stage in load_recipe(Path(recipe)).stages]
                assert commands_of == ["sft", "reward-model", "train", "eval"]
            case ["async-rlhf", "report", *runs, "--out", _]:
                assert all(run in ("runs/rlhf_sync", "runs/rlhf") for run in runs)
            case ["async-rlhf", command, *rest]:
                code = run_command_line(app, [command, *(word for word in rest if word != "--dry-run"), "--dry-run"])
                assert code == 0, (words, capsys.readouterr().err)
                dry += 1
                if command in ("sft", "train") and not Path("runs/rlhf").exists():
                    name = "runs/sft" if command == "sft" else "runs/rlhf"
                    shutil.copytree("base", f"{name}/checkpoints/final", dirs_exist_ok=True)
                if command == "reward-model":
                    make_reward_model(tmp_path / "runs/reward/checkpoints/final")
            case ["python", "-m", "vllm.entrypoints.openai.api_server", *_]:
                pass
            case [word, *_]:
                assert word in LEFT_OUT, words
    assert dry == 6


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.timeout(1200)
def test_it_runs_from_end_to_end(tmp_path: Path):
    write_files(PAGE, tmp_path)
    printed = [run_shell(content, tmp_path, LIMIT_S) for kind, content in blocks(PAGE) if kind == "bash"]
    assert_it_is_as_it_says(tmp_path, printed)


def assert_it_is_as_it_says(directory: Path, printed: list[str]) -> None:
    """
    Args:
        printed: by each block.
    """
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    for path in set(re.findall(r"`(runs/[\w./]+)`", text)):
        assert (directory / path).exists(), path

    def read(path: str) -> dict:
        return json.loads((directory / "runs" / path).read_text(encoding="utf-8"))

    assert read("sft/summary.json")["eval"]["after"]["loss"] < 0.3 * read("sft/summary.json")["eval"]["before"]["loss"]
    assert read("reward/summary.json")["eval"]["after"]["accuracy_low"] > 0.6
    for name, bound in (("rlhf_sync", 0), ("rlhf", 1)):
        steps = [json.loads(line) for line in (directory / "runs" / name / "metrics.jsonl").read_text().splitlines()]
        assert max(step["staleness/max"] for step in steps) == bound
        assert max(step.get("logprob_gap/mean_abs", 0) for step in steps) < 1e-4
        for reward in ("reward/proxy", "reward/gold"):
            assert sum(step[reward] for step in steps[-4:]) > sum(step[reward] for step in steps[:4]), (name, reward)
    looked = next(output for output in printed if output.startswith("rlhf_sync:"))
    assert looked.count("reward/gold") == looked.count("overlap efficiency") == 2
    for figures in (read("eval/eval.json"), read("aligned/eval/eval.json")):
        won = figures["wins"]["win_rate"]
        assert 0.5 < won["low"] < won["mean"] <= won["high"]
        assert figures["kl"]["kl_k3"]["low"] > 0
    served = next(output for output in printed if '"choices"' in output)
    asked = printed[printed.index(served) - 1].strip().splitlines()[-1]
    assert f'"content":"{asked}"' in served and "lime" in asked
    record = read("aligned/pipeline.json")
    assert record["status"] == "completed" and record["eval"]["win_rate"] == {
        key: read("aligned/eval/eval.json")["wins"]["win_rate"][key] for key in ("mean", "low", "high")
    }
