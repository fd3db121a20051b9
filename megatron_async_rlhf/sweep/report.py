"""All that a sweep tells of its points: results.json, the table on the terminal, the picture."""

from rich.console import Console

from megatron_async_rlhf.sweep.plot import write_plot
from megatron_async_rlhf.sweep.points import Sweep
from megatron_async_rlhf.sweep.results import collect, grouped, write_results
from megatron_async_rlhf.sweep.table import print_groups, print_unfinished


def write_report(console: Console, sweep: Sweep) -> None:
    """Of what there is.

    Raises:
        ConfigError: matplotlib is not installed; all but the picture is there then.
    """
    results = collect(sweep)
    paths = [write_results(sweep, results)]
    groups = grouped(sweep.section, results)
    print_groups(console, groups)
    print_unfinished(console, results)
    paths += write_plot(groups, sweep.directory)
    console.print(f"wrote {', '.join(str(path) for path in paths)}", markup=False)
