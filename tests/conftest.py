"""What all tests have in common."""

import os

import pytest

THOROUGH = "ASYNC_RLHF_TEST_THOROUGH"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get(THOROUGH) != "1":
        for item in items:
            if item.get_closest_marker("thorough"):
                item.add_marker(pytest.mark.skip(reason=f"takes long: set {THOROUGH}=1"))
