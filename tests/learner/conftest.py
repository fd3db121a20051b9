from pathlib import Path

import pytest
from learner_ranks import LAYOUTS, THOROUGH, Layout, LayoutRun, models, run_layout


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    return models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def run_of(tmp_path_factory: pytest.TempPathFactory, sources: dict[str, dict]):
    """Runs a layout the first time it is asked for; every test reads the same run."""
    runs: dict[Layout, LayoutRun] = {}
    root: Path = tmp_path_factory.mktemp("layouts")

    def get(layout: Layout) -> LayoutRun:
        if layout not in runs:
            runs[layout] = run_layout(layout, root / str(layout), sources)
        return runs[layout]

    return get


@pytest.fixture(
    scope="session",
    params=[pytest.param(each, marks=[pytest.mark.thorough] * (each in THOROUGH)) for each in LAYOUTS],
    ids=str,
)
def run(request: pytest.FixtureRequest, run_of) -> LayoutRun:
    return run_of(request.param)


@pytest.fixture(scope="session")
def single(run_of) -> LayoutRun:
    return run_of(Layout())
