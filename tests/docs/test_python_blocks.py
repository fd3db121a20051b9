"""Every Python block of the docs runs, here or in the test that is named."""

import inspect
from pathlib import Path

import pytest
from doc_blocks import PAGES, ROOT, blocks
from tiny_reward_model import make_reward_model

from megatron_async_rlhf.config.algorithms import LOSS_ARGUMENTS

TESTS = {
    "docs/algorithms.md": "tests/docs/test_python_blocks.py",
    "docs/nemo_run.md": "tests/cluster/test_nemo_run_page.py",
    "docs/own.md": "tests/docs/test_own.py",
    "docs/python.md": "tests/e2e/test_python_api.py",
    "docs/reward_model.md": "tests/docs/test_python_blocks.py",
    "docs/rewards.md": "tests/rewards/test_reward_docs.py",
    "docs/tutorial.md": "tests/pipeline/test_tutorial.py",
}


def python_blocks(page: str) -> list[str]:
    return [text for kind, text in blocks(page) if kind == "python"]


def test_every_page_with_python_has_a_test():
    with_python = [page for page in PAGES if python_blocks(page)]
    assert with_python == sorted(TESTS)
    assert [test for test in TESTS.values() if not (ROOT / test).is_file()] == []
    for page in with_python:
        for text in python_blocks(page):
            compile(text, page, "exec")


def test_a_loss_of_ones_own_has_the_parameters_that_it_is_given():
    (text,) = python_blocks("docs/algorithms.md")
    scope: dict = {}
    exec(text, scope)
    parameters = inspect.signature(scope["loss"]).parameters.values()
    assert tuple(each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD) == LOSS_ARGUMENTS


def test_a_reward_model_is_loaded_as_the_docs_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    make_reward_model(tmp_path / "runs/reward/checkpoints/final")
    (text,) = python_blocks("docs/reward_model.md")
    scope: dict = {}
    exec(text, scope)
    assert scope["model"].config.num_labels == 1
