"""Runs that are started from Python."""

import math
import re
import runpy
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

import megatron_async_rlhf
from megatron_async_rlhf import api, load_config, train
from megatron_async_rlhf.errors import ConfigError, RunError

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples/quickstart.yaml"
LIMIT = 3


def within_the_limit(completions: list[str]) -> list[float]:
    return [float(len(text) < LIMIT) for text in completions]


def with_a_default(completions: list[str], limit: int = LIMIT) -> list[float]:
    return [float(len(text) < limit) for text in completions]


def of_its_own(completions: Sequence[str]) -> list[float]:
    return [float(len(text)) for text in completions]


@pytest.mark.slow
def test_the_script_of_the_docs_runs(tmp_path: Path):
    """25 lines: a reward of one's own, five steps, a picture."""
    script = re.search(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(), re.DOTALL)[1]
    assert len([line for line in script.splitlines() if line.strip()]) <= 25
    (tmp_path / "script.py").write_text(script)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    ran = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert [line.split()[0] for line in ran.stdout.splitlines() if re.fullmatch(r"[1-5] -?[\d.]+", line)] == list(
        "12345"
    )
    assert "held out:" in ran.stdout and (tmp_path / "reward.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "runs/from_python/checkpoints/final").glob("*.safetensors"))
    assert "def ends_early" in (tmp_path / "runs/from_python.reward.py").read_text()


def test_what_the_package_offers():
    assert {name: getattr(megatron_async_rlhf, name).__name__ for name in megatron_async_rlhf.__all__} == {
        name: name for name in ("Run", "RunConfig", "load_config", "train")
    }
    with pytest.raises(AttributeError, match="no attribute trian"):
        megatron_async_rlhf.trian  # noqa: B018


def test_configurations_are_loaded_or_built():
    loaded = load_config(str(QUICKSTART), {"schedule.steps": 5, "reward": {"type": "builtin"}})
    assert loaded.schedule.steps == 5 and loaded.generator.max_new_tokens == 28
    sections = {"model": {"hf": "some/model"}}
    assert load_config(sections, {"schedule.steps": 7}).schedule.steps == 7 and sections == {
        "model": {"hf": "some/model"}
    }
    with pytest.raises(ConfigError, match="schedule.stesp"):
        load_config(QUICKSTART, {"schedule.stesp": 5})


def test_a_function_of_a_module_is_named_by_its_file(tmp_path: Path):
    config = load_config(QUICKSTART, {"run.dir": str(tmp_path / "run")})
    (reward,) = api._with_reward(config, of_its_own).rewards
    assert reward.function == f"{__file__}:of_its_own" and not list(tmp_path.iterdir())


def test_a_function_of_a_script_is_copied_if_it_needs_nothing_else(tmp_path: Path, monkeypatch):
    config = load_config(QUICKSTART, {"run.dir": str(tmp_path / "run")})
    monkeypatch.setattr(of_its_own, "__module__", "__main__")
    (reward,) = api._with_reward(config, of_its_own).rewards
    assert reward.function == f"{tmp_path}/run.reward.py:of_its_own"
    scored = runpy.run_path(str(tmp_path / "run.reward.py"))["of_its_own"](["ab", "c"])
    assert scored == [2.0, 1.0], "without what its annotations name"
    for function in (within_the_limit, with_a_default):
        monkeypatch.setattr(function, "__module__", "__main__")
        with pytest.raises(ConfigError, match=f"reward: {function.__name__} uses LIMIT from outside of it"):
            api._with_reward(config, function)
    with pytest.raises(ConfigError, match="must be a function made with def"):
        api._with_reward(config, math.sqrt)
    with pytest.raises(ConfigError, match="must be a function made with def"):
        api._with_reward(config, lambda completions: [0.0])


def test_a_function_without_source_is_refused(tmp_path: Path):
    """As one that was typed at Python's prompt."""
    scope: dict = {"__name__": "__main__"}
    exec("def score(completions):\n    return [0.0]", scope)
    config = load_config(QUICKSTART, {"run.dir": str(tmp_path / "run")})
    with pytest.raises(ConfigError, match="reward: Python does not know the source of score"):
        api._with_reward(config, scope["score"])


def test_what_the_command_refuses_is_refused(tmp_path: Path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(QUICKSTART.read_text())
    with pytest.raises(ConfigError, match="is the directory of a run: add --resume"):
        train(run)
    with pytest.raises(ConfigError, match="launch.nodes = 2: from Python a run has one machine"):
        train(load_config(QUICKSTART, {"launch.nodes": 2, "run.dir": str(tmp_path / "other")}))


def test_another_thread_is_refused():
    errors = []

    def call() -> None:
        try:
            train(QUICKSTART)
        except ConfigError as error:
            errors.append(str(error))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert errors == ["train: must be called from the main thread, which Ctrl-C and other signals reach"]


@pytest.mark.slow
def test_a_run_that_fails_raises(tmp_path: Path):
    config = load_config(
        QUICKSTART,
        {
            "run.dir": str(tmp_path / "run"), "warm_start.steps": 0, "schedule.steps": 2, "data.eval_prompts": 8,
            "data.train_prompts": 64, "schedule.prompts_per_step": 8,
        },
    )  # fmt: skip

    def fails(completions: list[str]) -> list[float]:
        raise ValueError("of its own")

    with pytest.raises(RunError, match="of its own"):
        train(config, reward=fails)
