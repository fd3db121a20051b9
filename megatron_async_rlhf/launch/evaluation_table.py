"""The results of an evaluation for a person: a table that fits 80 columns."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

_WIDTH = 80
_PARTS = {
    "metrics": "policy",
    "against_metrics": "against",
    "difference": "policy - against",
    "wins": "policy wins",
    "kl": "policy from kl_to",
}


def print_table(path: Path, console: Console | None = None) -> None:
    """What an `eval.json` says."""
    content = json.loads(path.read_text(encoding="utf-8"))
    console = console or Console(highlight=False, width=_WIDTH)
    table = Table(title=f"{content['prompts']} prompts, {content['samples']} x temperature {content['temperature']:g}")
    table.add_column("", overflow="fold")
    for name in ("mean", "low", "high"):
        table.add_column(name, justify="right", no_wrap=True)
    for title, rows in sections(content):
        table.add_section()
        table.add_row(f"[bold]{title}[/bold]")
        for name, interval in rows:
            table.add_row(f"  {name}", *(f"{interval[key]:.4g}" for key in ("mean", "low", "high")))
    console.print(table)
    console.print(f"intervals: {content['confidence']:.4g} of {content['bootstrap']} resamples", markup=False)
    for key in ("policy", "against", "judged_by", "kl_to"):
        if content[key] is not None:
            console.print(f"{key}: {content[key]}", markup=False)
    console.print(f"results: {path}", markup=False)


def sections(content: dict[str, Any]) -> Iterator[tuple[str, list[tuple[str, dict[str, float]]]]]:
    """Of an `eval.json`: a title, and the intervals by name."""
    for part, title in _PARTS.items():
        rows = [(name, value) for name, value in content.get(part, {}).items() if isinstance(value, dict)]
        if rows:
            yield title, rows
