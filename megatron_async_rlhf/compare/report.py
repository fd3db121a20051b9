"""What a comparison leaves: `compare.json`, `compare.html` and `compare.png`, and tables on the terminal."""

import io
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_async_rlhf.compare.comparison import Comparison, to_json
from megatron_async_rlhf.compare.plot import draw
from megatron_async_rlhf.compare.verdict import number, verdict_of
from megatron_async_rlhf.pages.rendering import render
from megatron_async_rlhf.telemetry.files import replace_file, writing

JSON, PAGE, PICTURE = "compare.json", "compare.html", "compare.png"
_PERCENT = 100.0
# Label, figure, decimals, scale; what is None in all schedules is left out.
_ROWS: tuple[tuple[str, str, int, float], ...] = (
    ("RL loop, s", "wall_seconds", 1, 1.0),
    ("a step, s", "step_seconds", 2, 1.0),
    ("generation in a step, s", "generate_seconds", 2, 1.0),
    ("training in a step, s", "train_seconds", 2, 1.0),
    ("learner idle, %", "learner_idle", 1, _PERCENT),
    ("generators idle, %", "generators_idle", 1, _PERCENT),
    ("overlap efficiency", "overlap", 3, 1.0),
    ("stalled for pushes, %", "push_stall", 1, _PERCENT),
    ("samples/s", "samples_per_second", 2, 1.0),
    ("start-up (not in the loop), s", "startup_seconds", 0, 1.0),
    ("held-out reward before", "before", 3, 1.0),
    ("held-out reward after", "after", 3, 1.0),
    ("win rate over before", "win_rate", 3, 1.0),
    ("KL to the reference, nats", "kl", 2, 1.0),
)
_DIFFERENCES: tuple[tuple[str, str, int, float], ...] = (
    ("speed-up", "speedup", 2, 1.0),
    ("time saved, %", "time_saved", 0, _PERCENT),
    ("speed-up at most", "speedup_limit", 2, 1.0),
    ("time over the slower side's alone", "inflation", 3, 1.0),
    ("held-out reward", "held_out_reward", 3, 1.0),
    ("win rate", "win_rate", 3, 1.0),
    ("KL, nats", "kl", 2, 1.0),
    ("training reward, equal samples", "reward_at_equal_samples", 3, 1.0),
    ("training reward, equal time", "reward_at_equal_time", 3, 1.0),
)

Rows = list[tuple[str, list[str]]]


def write_comparison(comparison: Comparison, directory: Path) -> list[Path]:
    """
    Raises:
        ConfigError: matplotlib is not installed; `compare.json` is there then.
        WriteError: the directory cannot be written to.
    """
    verdict = verdict_of(comparison)
    paths = [directory / name for name in (JSON, PICTURE, PAGE)]
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        replace_file(paths[0], json.dumps(to_json(comparison, verdict), indent=1) + "\n")
        figure = draw(comparison)
        picture, vector = io.BytesIO(), io.StringIO()
        figure.savefig(picture, dpi=120, format="png")
        figure.savefig(vector, format="svg")
        replace_file(paths[1], picture.getvalue())
        replace_file(paths[2], _page(comparison, verdict, vector.getvalue()))
    return paths


def show(console: Console, comparison: Comparison) -> None:
    """The verdict, and what it rests on."""
    for names, rows in ((list(comparison.schedules), schedule_rows(comparison)), _against(comparison)):
        table = Table("", *names)
        for label, cells in rows:
            table.add_row(label, *cells)
        console.print(table)
    for note in comparison.notes:
        console.print(f"note: {note}", markup=False)
    console.print(verdict_of(comparison), markup=False)


def schedule_rows(comparison: Comparison) -> Rows:
    """A column for each schedule: means over seeds, intervals in parentheses."""
    return _rows(_ROWS, list(comparison.schedules.values()))


def against_rows(comparison: Comparison) -> Rows:
    """A column for each baseline: asynchronous over it, or minus it."""
    return _rows(_DIFFERENCES, list(comparison.against.values()))


def _against(comparison: Comparison) -> tuple[list[str], Rows]:
    return [f"async against {name}" for name in comparison.against], against_rows(comparison)


def _rows(rows: tuple[tuple[str, str, int, float], ...], columns: list) -> Rows:
    shown = []
    for label, key, decimals, scale in rows:
        values = [getattr(column, key) for column in columns]
        if any(value is not None for value in values):
            shown.append((label, ["-" if value is None else number(value, decimals, scale) for value in values]))
    return shown


def _page(comparison: Comparison, verdict: str, picture: str) -> str:
    """One file that needs no other."""
    first = comparison.runs[0].config
    against, against_cells = _against(comparison)
    return render(
        "compare/page.html.jinja",
        title="Asynchronous against synchronous training",
        verdict=verdict,
        picture=picture[picture.index("<svg") :],
        schedules=(list(comparison.schedules), _lines(schedule_rows(comparison))),
        against=(against, _lines(against_cells)),
        notes=comparison.notes,
        runs=[
            [run.directory, run.schedule, run.seed, run.steps, run.samples, f"{run.wall_s:.1f}"]
            for run in comparison.runs
        ],
        config=first,
    )


def _lines(rows: Rows) -> list[list[str]]:
    return [[label, *cells] for label, cells in rows]
