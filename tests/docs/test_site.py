"""The site of the docs is built from the files as they are, and no link in them leads nowhere."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytest.importorskip("material", reason="mkdocs-material is not installed (extra: test)")
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_link_leads_somewhere(tmp_path):
    build = subprocess.run(
        [sys.executable, ROOT / "tools/site/build.py", tmp_path / "site"],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert build.returncode == 0, build.stdout + build.stderr
    assert "Asynchronous RLHF" in (tmp_path / "site/index.html").read_text()
    page = (tmp_path / "site/docs/configuration/index.html").read_text()
    assert "schedule.max_staleness" in page
    assert (tmp_path / "site/docs/results/report.png").stat().st_size > 10_000


def test_every_page_has_its_place():
    class Loader(yaml.SafeLoader):
        """For the slug function in it."""

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)
    nav = yaml.load((ROOT / "tools/site/mkdocs.yml").read_text(), Loader)["nav"]
    placed: set[str] = set()
    for entry in nav:
        for value in entry.values():
            placed |= {value} if isinstance(value, str) else {page for each in value for page in each.values()}
    pages = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"]
    pages += [
        path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("docs/*.md"), *ROOT.glob("examples/*/README.md")]
    ]
    assert placed == set(pages)


def test_the_page_of_commands_is_what_help_says():
    said = subprocess.run(
        [sys.executable, ROOT / "tools/site/commands.py"], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert said.strip() == (ROOT / "docs/commands.md").read_text().strip(), (
        "make it anew: python tools/site/commands.py > docs/commands.md"
    )
