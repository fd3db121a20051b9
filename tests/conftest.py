"""What all tests have in common."""

import os
from pathlib import Path

import pytest

THOROUGH = "ASYNC_RLHF_TEST_THOROUGH"
ROOT = Path(__file__).parent
# No test in these is quick, although many are not marked slow: their ranks, servers or builds are started once for all.
SLOW_FILES = {
    "checkpoint/test_megatron.py",
    "checkpoint/test_resumption.py",
    "cluster/test_jobs.py",
    "learner/test_against_transformers.py",
    "learner/test_algorithms.py",
    "learner/test_commands.py",
    "learner/test_deep_layouts.py",
    "learner/test_layouts.py",
    "launch/test_fleet.py",
}
# Slow tests that are quick ones all the same, because nothing else shows what they do.
ONE_OF_ITS_KIND = {"e2e/test_runs.py::test_a_run_in_every_layout[tp1-generator-tp1]"}


def is_quick(item: pytest.Item) -> bool:
    """Whether a test is part of the choice that `tools/test.sh --quick` runs."""
    file = item.path.relative_to(ROOT).as_posix()
    if f"{file}::{item.name}" in ONE_OF_ITS_KIND:
        return True
    return file not in SLOW_FILES and not any(map(item.get_closest_marker, ("slow", "thorough", "gpu")))


@pytest.hookimpl(tryfirst=True)  # before `-m quick` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if is_quick(item):
            item.add_marker(pytest.mark.quick)
        if os.environ.get(THOROUGH) != "1" and item.get_closest_marker("thorough"):
            item.add_marker(pytest.mark.skip(reason=f"takes long: set {THOROUGH}=1"))
