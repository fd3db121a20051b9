"""The blocks of a page of the docs: files that it makes, and commands that it runs."""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).parents[1]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *(path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("docs/*.md"))),
]
PAGES += [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("examples/*/README.md"))]
_BLOCK = re.compile(
    r"^(?P<indent> *)```(?P<kind>bash|python|yaml)\n(?P<text>.*?)^(?P=indent)```", re.DOTALL | re.MULTILINE
)
_FILE = re.compile(r"# ([\w.]+\.(?:py|yaml))\n")  # the first line of a block that is a file


def blocks(page: str) -> list[tuple[str, str]]:
    """Kind and text of each, in order."""
    found = _BLOCK.finditer((ROOT / page).read_text(encoding="utf-8"))
    return [(block["kind"], dedent(block["text"])) for block in found]


def write_files(page: str, directory: Path) -> None:
    """Every block that is no command must begin with the name of its file."""
    for kind, content in blocks(page):
        if kind != "bash":
            name = _FILE.match(content)
            assert name, f"a block of {kind} without the name of its file: {content[:40]}"
            (directory / name[1]).write_text(content, encoding="utf-8")


def commands(page: str) -> list[list[str]]:
    """Of all blocks, in order, as words."""
    found, pending = [], ""
    for line in "".join(content for kind, content in blocks(page) if kind == "bash").replace("\\\n", " ").splitlines():
        pending += line + "\n"
        try:
            words = shlex.split(pending, comments=True)
        except ValueError:
            continue  # a quoted text continues in the next line
        if words:
            found.append(words)
        pending = ""
    return found


def run_shell(script: str, directory: Path, limit_s: float) -> str:
    """A script, as a shell with this environment runs it; what it printed."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    shell = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=directory, env=environment, start_new_session=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        output, _ = shell.communicate(timeout=limit_s)
    finally:
        if shell.poll() != 0:  # a server in the background goes with the shell that failed
            with contextlib.suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)
    assert shell.returncode == 0, f"{script}\n{output}"
    return output
