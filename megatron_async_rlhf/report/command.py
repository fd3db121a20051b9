"""`async-rlhf report`: from run directories to a page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.telemetry.files import EVALUATION, replace_file, writing

_NAME = "report.html"


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Run directories, whose curves are laid over each other; or that of an evaluation."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help=f"The page. Default: {_NAME} in the run, or in the directory that the first of several is in."
        ),
    ] = None,
) -> None:
    """Write a page about runs that opens from disk: figures, advice, curves, timeline, samples, configuration.

    Of a run that is still running, it shows what there is so far.

    Example: async-rlhf report runs/quickstart
    """
    directories = list(dict.fromkeys(run.resolve() for run in runs))
    path = out or (runs[0] if len(directories) == 1 else directories[0].parent) / _NAME
    content = _page(directories)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, content)
    typer.echo(f"wrote {path}")


def _page(directories: Sequence[Path]) -> str:
    from megatron_async_rlhf.report.evaluation import evaluation_page
    from megatron_async_rlhf.report.page import page
    from megatron_async_rlhf.report.run import read_reported

    names = _told_apart(directories)
    evaluations = [directory for directory in directories if (directory / EVALUATION).is_file()]
    if not evaluations:
        return page([read_reported(*run) for run in zip(directories, names, strict=True)])
    if len(directories) > 1:
        raise ConfigError(f"{evaluations[0]}: is an evaluation, which has a page of its own; give it alone")
    return evaluation_page(directories[0], names[0])


def _told_apart(directories: Sequence[Path]) -> list[str]:
    """The last parts of their paths, as many as it takes for them to differ."""
    depth = 1
    while len({path.parts[-depth:] for path in directories}) < len(directories):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in directories]
