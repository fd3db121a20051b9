"""docs/own.md: its files are made and its commands run as they are printed."""

import json
import re
import shlex
import time
from pathlib import Path

import pytest
from doc_blocks import ROOT, blocks, commands, run_shell, write_files

PAGE = "docs/own.md"
SET_UP = 2  # commands that have been run before any test is


def test_it_takes_no_more_commands_than_it_says():
    said = re.search(r"in (\w+) commands", (ROOT / PAGE).read_text())[1]
    assert said == "nine" and len(commands(PAGE)) == 9


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_every_command_runs(tmp_path: Path):
    assert [kind for kind, _ in blocks(PAGE)] == ["bash", "python", "python", "python", "bash"]
    write_files(PAGE, tmp_path)
    for words in commands(PAGE)[SET_UP:]:
        began = time.monotonic()
        run_shell(shlex.join(words), tmp_path, 300)
        print(f"{time.monotonic() - began:6.1f} s  {shlex.join(words)}")
    summary = json.loads((tmp_path / "runs/my_run/summary.json").read_text())
    assert summary["status"] == "completed" and summary["steps"] == 32
    assert (tmp_path / "runs/my_run/report.html").stat().st_size > 10_000
    assert list((tmp_path / "runs/my_run/checkpoints/final").glob("*.safetensors"))
    assert "# " in (tmp_path / "my_run.yaml").read_text()
