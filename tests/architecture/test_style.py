"""What ruff and mypy find, with the settings of pyproject.toml: nothing; and what pytest could not find."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = {
    "check": ["ruff", "check", "--no-cache", "."],
    "format": ["ruff", "format", "--check", "--no-cache", "."],
    "types": ["mypy", "--cache-dir", "/dev/null"],
}


@pytest.mark.parametrize(
    "command",
    [pytest.param(words, id=name, marks=[pytest.mark.slow] * (name == "types")) for name, words in COMMANDS.items()],
)
def test_there_is_nothing_to_say(command: list[str]):
    told = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )
    assert told.returncode == 0, told.stdout


def test_each_test_file_has_a_name_of_its_own():
    """Pytest imports them by that alone, and collects only one of two."""
    names = Counter(
        path.name for path in (ROOT / "tests").rglob("*.py") if path.name not in ("conftest.py", "__init__.py")
    )
    assert [name for name, count in names.items() if count > 1] == []
