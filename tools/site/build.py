"""Builds the site of the docs, and fails if a link in them leads nowhere:

    python tools/site/build.py site        # then: python -m http.server -d site

The pages are the files of the repository as they are. Besides them goes what they link to; a folder that has no README gets
a list of its files.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "docs/*.md", "examples/*/README.md")
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)\s#]+)(?=[)#])")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, help="folder to write; what is there is replaced")
    out = parser.parse_args().out.absolute()
    with tempfile.TemporaryDirectory() as directory:
        staged = Path(directory) / "pages"
        for pattern in PAGES:
            for page in sorted(ROOT.glob(pattern)):
                stage_page(page, staged)
        config = Path(directory) / "mkdocs.yml"
        own = (Path(__file__).parent / "mkdocs.yml").read_text(encoding="utf-8")
        config.write_text(f"{own}\ndocs_dir: {staged}\nsite_dir: {out}\n", encoding="utf-8")
        build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--config-file", str(config)]
        return subprocess.run(build, check=False).returncode


def stage_page(page: Path, staged: Path) -> None:
    """A copy of a page in which links to folders lead to pages, and of the files that it links to."""

    def lead_on(link: re.Match[str]) -> str:
        target = Path(os.path.normpath(page.parent / link[1]))
        if not target.exists() or not target.is_relative_to(ROOT):
            return link[1]  # mkdocs says so
        if target.is_dir():
            stage_listing(target, staged)
            return f"{link[1].rstrip('/')}/README.md"
        copy(target, staged)
        return link[1]

    text = LINK.sub(lead_on, page.read_text(encoding="utf-8"))
    path = staged / page.relative_to(ROOT)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def stage_listing(folder: Path, staged: Path) -> None:
    """A page with the files of a folder, unless it has a README."""
    path = staged / folder.relative_to(ROOT) / "README.md"
    if (folder / "README.md").is_file() or path.exists():
        return
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.name != "__init__.py")
    for file in files:
        if not (staged / file.relative_to(ROOT)).exists():
            copy(file, staged)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"# {folder.relative_to(ROOT)}", "", *(f"- [{file.name}]({file.name})" for file in files)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def copy(file: Path, staged: Path) -> None:
    if file.suffix == ".md":
        return  # a page
    path = staged / file.relative_to(ROOT)
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, path)


if __name__ == "__main__":
    raise SystemExit(main())
