"""The names that docs/run_directory.md has in its tables, by the heading above each."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs/run_directory.md"
_HEADING, _ROW = re.compile(r"^## `(.+)`$"), re.compile(r"^\| `([^`]+)` \| ([^|]+) \| (.+) \|$")


def documented(file: str) -> list[str]:
    """The names in the table of keys of a file; each has a unit and a meaning."""
    found, heading, is_table = [], "", False
    for line in DOCS.read_text(encoding="utf-8").splitlines():
        if is_heading := _HEADING.match(line):
            heading = is_heading[1]
        is_table = line.startswith("|") and (is_table or line == "| key | unit | meaning |")
        if heading == file and is_table and (row := _ROW.match(line)):
            found.append(row[1])
    assert found, f"{DOCS} has no table of {file}"
    return found
