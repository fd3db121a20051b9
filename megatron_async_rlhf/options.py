"""Options and arguments that several commands have, and how a command warns and notes."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

ConfigArgument = Annotated[
    Path,
    typer.Argument(help="YAML configuration, such as examples/quickstart.yaml; to resume, also a run's directory."),
]
SetOption = Annotated[list[str], typer.Option("--set", "-s", help="Override one key: section.key=value. Repeatable.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, start nothing.")]
ResumeOption = Annotated[
    bool,
    typer.Option("--resume", help="Continue from the last checkpoint in run.dir; from the beginning if there is none."),
]
NodeRankOption = Annotated[
    int,
    typer.Option(
        envvar="SLURM_NODEID", min=0, help="Which of launch.nodes machines this is; the first one supervises."
    ),
]


def warn(lines: Iterable[str]) -> None:
    for line in lines:
        typer.echo(f"warning: {line}", err=True)


def note(lines: Iterable[str]) -> None:
    """What has been decided without being asked, for whoever wants to see that it is right."""
    for line in lines:
        typer.echo(f"note: {line}", err=True)
