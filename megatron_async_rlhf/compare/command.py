"""`async-rlhf compare`: from the command line to runs, made or given, and the report of them."""

from pathlib import Path
from typing import Annotated

import typer

from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.options import SetOption


def compare(
    sources: Annotated[
        list[Path],
        typer.Argument(help="A YAML configuration, whose runs are made; or directories of completed runs."),
    ],
    set: SetOption = [],
    seeds: Annotated[str, typer.Option(help="Of a configuration: seeds to run each schedule with.")] = "0,1,2",
    baseline: Annotated[
        list[str], typer.Option(help="Of a configuration: same_split or alternating. Repeatable. Default: both.")
    ] = [],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and list all runs, start nothing.")] = False,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Of a configuration: compare the runs that there are; start nothing.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Directory of the report. Default: that which the runs are in.")
    ] = None,
) -> None:
    """Find out whether asynchronous training pays on a task: train it both ways, and compare time and quality.

    Synchronous on the same split of the devices (one side idles while the other works), and with all devices in turn.

    Runs seed by seed, and completed runs are not repeated. Exit code 0 if all runs are completed, 1 if one failed, 130 if
    some are left to do.

    Example: async-rlhf compare examples/quickstart.yaml --seeds 0,1,2
    """
    from rich.console import Console

    from megatron_async_rlhf.compare.comparison import compare_runs
    from megatron_async_rlhf.compare.making import check_runs, completed_runs, make_runs, planned_runs
    from megatron_async_rlhf.compare.report import show, write_comparison
    from megatron_async_rlhf.compare.runs import read_run
    from megatron_async_rlhf.sweep.table import print_points

    console = Console(highlight=False, soft_wrap=True)
    code = 0
    if all(source.is_dir() for source in sources):
        runs, directory = [read_run(source) for source in sources], sources[0].parent
    else:
        plan = planned_runs(sources, set, seeds, baseline, weights=not (dry_run or report_only))
        if not report_only:
            check_runs(plan)
        if dry_run:
            print_points(console, plan, plan.points)
            return
        if not report_only:
            code = make_runs(plan, console)
        runs, directory = completed_runs(plan), plan.directory
    try:
        comparison = compare_runs(runs)
    except ConfigError as error:
        if not code:
            raise
        console.print(f"nothing to compare yet: {error}", markup=False)  # a run failed, or was interrupted
    else:
        written = write_comparison(comparison, out or directory)
        show(console, comparison)
        console.print(f"wrote {', '.join(map(str, written))}", markup=False)
    raise typer.Exit(code)
