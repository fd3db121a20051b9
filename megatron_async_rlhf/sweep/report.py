"""All that a sweep tells of its points: results.json, the table on the terminal, the picture, and a page with all of it."""

from pathlib import Path

from rich.console import Console

from megatron_async_rlhf.pages.rendering import render
from megatron_async_rlhf.sweep.plot import write_plot
from megatron_async_rlhf.sweep.points import Sweep
from megatron_async_rlhf.sweep.results import Group, PointResult, collect, grouped, write_results
from megatron_async_rlhf.sweep.table import group_rows, print_groups, print_unfinished
from megatron_async_rlhf.telemetry.files import replace_file, writing

PAGE = "sweep.html"


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
    pictures = write_plot(groups, sweep.directory)
    paths += pictures
    if pictures:
        paths.append(_write_page(sweep, results, groups, pictures[0]))
    console.print(f"wrote {', '.join(str(path) for path in paths)}", markup=False)


def _write_page(sweep: Sweep, results: list[PointResult], groups: list[Group], picture: Path) -> Path:
    path, drawn = sweep.directory / PAGE, picture.read_text(encoding="utf-8")
    content = render(
        "sweep/page.html.jinja",
        title=f"{sweep.directory.name}: {len(results)} runs",
        picture=drawn[drawn.index("<svg") :],
        groups=group_rows(groups),
        points=[_point(result) for result in results],
        axes=[[axis, ", ".join(choices)] for axis, choices in sweep.section.axes.items()],
        directory=sweep.directory,
    )
    with writing(path):
        replace_file(path, content)
    return path


def _point(result: PointResult) -> list[str]:
    figures = (result.reward_before, result.reward_after, result.kl_to_reference)
    cells = [result.name, result.status, *(_shown(count, "d") for count in (result.steps, result.samples))]
    return [*cells, *(_shown(figure, ".3f") for figure in figures), _shown(result.seconds, ".0f")]


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
