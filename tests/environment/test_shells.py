"""Whole runs in shells that have everything set: completed, and equal to the last digit to one in a clean shell."""

import os
import resource
import subprocess
from pathlib import Path

import pytest
from settings import SETTINGS
from shells import TINY, results, settings, start

pytestmark = pytest.mark.thorough
EACH = "ASYNC_RLHF_TEST_EACH_SETTING"  # a run for each setting: half an hour

MODULES = ("random", "queue", "statistics", "yaml", "tokenizers", "numpy", "uvloop", "transformers")
PACKAGES = ("torch", "vllm", "megatron", "datasets", "config", "data")


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> dict[str, object]:
    """The result in a shell that has nothing set."""
    directory = tmp_path_factory.mktemp("clean")
    inherited = {name for setting in SETTINGS.values() for name in setting.variables} - {"HOME"}
    told = start(train(directory / "run"), directory, without=tuple(inherited))
    assert told.returncode == 0, told.stdout
    return results(directory / "run")


def train(run_dir: Path) -> list[str]:
    return ["train", str(TINY), *settings(f"run.dir='{run_dir}'", "schedule.mode=sync")]


def limits() -> None:
    """Of a login shell, a container and somebody who looks for a crash."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 1024))
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
    os.umask(0o077)


@pytest.mark.timeout(600)
def test_all_settings_together(tmp_path: Path, clean: dict[str, object]):
    """With a working directory full of modules that are not ours, a path of every kind of letter, a locale that is not
    UTF-8, and low limits."""
    here = tmp_path / "here"
    here.mkdir()
    for name in MODULES:
        (here / f"{name}.py").write_text("raise RuntimeError('the wrong module')", encoding="utf-8")
    for name in PACKAGES:
        (here / name).mkdir()
        (here / name / "__init__.py").write_text("raise RuntimeError('the wrong module')", encoding="utf-8")
    command = ["localedef", "-i", "POSIX", "-f", "ISO-8859-1", str(tmp_path / "x.ISO-8859-1")]
    subprocess.run(command, capture_output=True, timeout=60, check=False)
    variables = {name: value for setting in SETTINGS.values() for name, value in setting.variables.items()}
    variables |= {"LC_ALL": "x.ISO-8859-1", "LOCPATH": str(tmp_path)}
    run_dir = tmp_path / "a b %s:é 目录 #1 $ {}" / ("long" * 30) / "run"
    told = start(train(run_dir), here, variables, prepare=limits)
    assert told.returncode == 0, told.stdout
    assert results(run_dir) == clean


@pytest.mark.skipif(os.environ.get(EACH) != "1", reason=f"takes half an hour: set {EACH}=1")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", SETTINGS)
def test_each_setting_alone(tmp_path: Path, clean: dict[str, object], name: str):
    told = start(train(tmp_path / "run"), tmp_path, SETTINGS[name].variables)
    assert told.returncode == 0, told.stdout
    assert results(tmp_path / "run") == clean
