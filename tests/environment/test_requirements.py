"""An environment without one of the package's requirements, which `pip install --no-deps` makes."""

from importlib import metadata

import pytest

from megatron_async_rlhf import entry, installed


@pytest.fixture
def lacks(monkeypatch: pytest.MonkeyPatch):
    def lacks(*names: str) -> None:
        real = metadata.version

        def version(name: str) -> str:
            if name in names:
                raise metadata.PackageNotFoundError(name)
            return real(name)

        monkeypatch.setattr(installed.metadata, "version", version)

    return lacks


def test_this_environment_has_them_all():
    assert installed.missing_requirements() == []


def test_what_is_missing_is_one_line_before_anything_is_loaded(lacks, capsys):
    lacks("pebble", "tenacity", "torch")  # torch belongs to an extra
    with pytest.raises(SystemExit) as ended:
        entry.main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: pebble>=5, tenacity>=9: not installed here, in ")
    assert line.endswith("pip install 'pebble>=5' 'tenacity>=9'")


def test_a_checkout_that_was_not_installed_is_taken_as_it_is(monkeypatch):
    def requires(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(installed.metadata, "requires", requires)
    assert installed.missing_requirements() == []
