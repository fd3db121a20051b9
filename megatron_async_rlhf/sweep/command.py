"""`async-rlhf sweep`: from the command line to the points that are run, and the report of them."""

from pathlib import Path
from typing import Annotated

import typer

from megatron_async_rlhf.config.load import read_tree
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.launch.surroundings import check_surroundings
from megatron_async_rlhf.launch.terminal import outlive_readers
from megatron_async_rlhf.options import SetOption, warn


def sweep(
    config: Annotated[Path, typer.Argument(help="Configuration with a sweep section, such as examples/sweep.yaml.")],
    set: SetOption = [],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and list all runs, start nothing.")] = False,
    only: Annotated[
        list[str], typer.Option(help="Only these points: axis=label or axis=label,label. Repeatable.")
    ] = [],
    max_seconds: Annotated[
        float | None, typer.Option(min=0, help="Start no more runs after so long; the same command continues later.")
    ] = None,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Results, table and plot of what there is; start nothing.")
    ] = False,
) -> None:
    """Train every combination of the axes in the configuration's sweep section, and compare them.

    Completed runs are not repeated. Exit code 0 if all are completed, 1 if one failed, 130 if some are left to do.

    Example: async-rlhf sweep examples/sweep.yaml --only seed=0 --max-seconds 3600
    """
    from rich.console import Console

    from megatron_async_rlhf.sweep.driver import Driver, check_directory, parse_only
    from megatron_async_rlhf.sweep.inputs import check_inputs_of_earlier_points
    from megatron_async_rlhf.sweep.points import expand
    from megatron_async_rlhf.sweep.preflight import check_points
    from megatron_async_rlhf.sweep.report import write_report
    from megatron_async_rlhf.sweep.results import collect, write_results
    from megatron_async_rlhf.sweep.table import print_points

    whole = expand(read_tree(config, set), weights=not (dry_run or report_only))
    points = whole.only(parse_only(only))
    check_directory(whole.directory)
    console = Console(
        highlight=False, soft_wrap=True, width=max(Console().width, 110)
    )  # a table cut short says nothing
    if report_only:
        write_report(console, whole)
        return
    check_points(whole, points)
    check_inputs_of_earlier_points(whole)
    if dry_run:
        print_points(console, whole, points)
        return
    warn(check_surroundings())
    outlive_readers()
    driver = Driver(
        whole,
        note=lambda line: console.print(line, markup=False),
        after_point=lambda: write_results(whole, collect(whole)),
    )
    code = driver.run(points, max_seconds=max_seconds)
    try:
        write_report(console, whole)
    except ConfigError as error:  # what became of the runs counts, not whether there is a picture of them
        warn([str(error)])
    raise typer.Exit(code)
