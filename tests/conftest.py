"""What all tests have in common."""

import os
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before any test imports a library: vLLM and PyTorch set variables in the process that imports them.
ENVIRONMENT = dict(os.environ)
THOROUGH = "ASYNC_RLHF_TEST_THOROUGH"
ROOT = Path(__file__).parent
# No test in these is quick, although many are not marked slow: they start ranks once for all,
# or a command for each test.
SLOW_FILES = {
    "checkpoint/test_converter_commands.py",
    "checkpoint/test_earlier_versions.py",
    "checkpoint/test_megatron.py",
    "checkpoint/test_memory.py",
    "checkpoint/test_resumption.py",
    "cli/test_bad_input.py",
    "cli/test_doctor.py",
    "cluster/test_jobs.py",
    "cluster/test_slurm_testbed.py",
    "e2e/test_sft.py",
    "estimate/test_activations.py",
    "estimate/test_learner_memory.py",
    "launch/test_fleet.py",
    "learner/test_against_transformers.py",
    "learner/test_algorithms.py",
    "learner/test_commands.py",
    "learner/test_deep_layouts.py",
    "learner/test_distribution.py",
    "learner/test_layouts.py",
    "learner/test_reward_model_training.py",
    "simulate/test_random_schedules.py",
    "environment/test_child_environment.py",
    "environment/test_interpreter.py",
    "launch/test_causes.py",
    "launch/test_layout.py",
    "launch/test_supervisor.py",
    "pipeline/test_pipeline_dry_run.py",
    "scheduler/test_faulty_reward_servers.py",
    "scheduler/test_saving.py",
    "model_directories/test_model_directories.py",
    "rewards/test_function_reward.py",
    "rewards/test_ifeval_reward.py",
    "rewards/test_judge.py",
    "rewards/test_math_reward.py",
    "rewards/test_verifier.py",
    "simulate/test_command.py",
    "sweep/test_driver.py",
    "tools/test_gpu_check.py",
    "weights/test_plan.py",
    "weights/test_transfer.py",
}
# Where several processes share the tests, those of a file stay together, because they share what is slow; and these files.
WITH = {
    f"tests/learner/{file}.py": "tests/learner/test_layouts.py"
    for file in ("test_against_transformers", "test_commands")
}
# Slow tests that are quick ones all the same, because nothing else shows what they do.
ONE_OF_ITS_KIND = {
    "e2e/test_schedules.py::test_a_streaming_run_can_be_replayed",
    "model_directories/test_model_directories.py::test_a_description_without_weights_can_be_planned_with_and_not_started",
}


def is_quick(item: pytest.Item) -> bool:
    """Whether a test is part of the choice that `tools/test.sh --quick` runs."""
    file = item.path.relative_to(ROOT).as_posix()
    if f"{file}::{item.name}" in ONE_OF_ITS_KIND:
        return True
    return file not in SLOW_FILES and not any(map(item.get_closest_marker, ("slow", "thorough", "gpu")))


@pytest.fixture(autouse=True)
def environment_of_a_user() -> Iterator[None]:
    """What a test starts gets the environment that the tests were started in, whatever earlier tests have imported."""
    added = os.environ.keys() - ENVIRONMENT.keys() - {"PYTEST_CURRENT_TEST"}
    with pytest.MonkeyPatch.context() as patch:
        for name in added:
            patch.delenv(name)
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        yield


@pytest.fixture
def starts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty directory, outside of Slurm; nothing may be started."""
    monkeypatch.chdir(tmp_path)
    for variable in ("SLURM_NODEID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES"):
        monkeypatch.delenv(variable, raising=False)

    def refuse(*arguments: object, **keywords: object) -> None:
        raise AssertionError(f"a process was started: {arguments}")

    monkeypatch.setattr(subprocess.Popen, "__init__", refuse)  # the class itself stands in annotations


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object | None:
    """`--dist loadfile`, but for the files that are WITH another, and in the order of collection."""
    if config.getvalue("dist") != "loadfile":
        return None
    config.option.loadscopereorder = False  # it deals files with few tests last, and those are the longest ones
    from xdist.scheduler import LoadFileScheduling

    class Together(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return WITH.get(file, file)

    return Together(config, log)


@pytest.hookimpl(tryfirst=True)  # before `-m quick` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what is quick and skips what is thorough; long files come first, so that none runs alone at the end."""
    for item in items:
        if is_quick(item):
            item.add_marker(pytest.mark.quick)
        if os.environ.get(THOROUGH) != "1" and item.get_closest_marker("thorough"):
            item.add_marker(pytest.mark.skip(reason=f"takes long: set {THOROUGH}=1"))
    long = Counter(
        item.path for item in items if item.get_closest_marker("slow") and not item.get_closest_marker("skip")
    )
    items.sort(key=lambda item: -long[item.path])
