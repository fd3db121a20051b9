"""What `tools/test.sh --quick` leaves out."""

from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


def test_every_area_has_quick_tests(request: pytest.FixtureRequest):
    """Of the areas that this session has collected whole."""
    items = request.session.items
    files = {item.path for item in items}
    whole = {area for area in {file.parent for file in files} if files.issuperset(area.glob("test_*.py"))}
    assert whole - {item.path.parent for item in items if item.get_closest_marker("quick")} == set()


def test_what_the_choice_names_is_there(request: pytest.FixtureRequest):
    """A file or test that has moved must be named anew, or the choice gets slow, or loses an area, unnoticed."""
    conftest = request.config.pluginmanager.get_plugin(str(TESTS / "conftest.py"))
    assert [file for file in conftest.SLOW_FILES if not (TESTS / file).is_file()] == []
    for name in conftest.ONE_OF_ITS_KIND:
        file, _, test = name.partition("::")
        assert f"def {test.partition('[')[0]}(" in (TESTS / file).read_text()
