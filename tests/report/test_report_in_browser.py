"""Pages as people see them: in Chromium, wide and narrow, light and dark, without a network, with the clock anywhere."""

from pathlib import Path

import pytest
from browser import look, needs_chromium
from reported_runs import leave_reported_run
from typer.testing import CliRunner

from megatron_async_rlhf.cli import app

pytestmark = [needs_chromium, pytest.mark.xdist_group("browser")]
INKED = """(() => { const c = document.querySelector('#timeline canvas'), d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
const seen = new Set(); for (let i = 0; i < d.length; i += 4) seen.add(d[i] << 16 | d[i + 1] << 8 | d[i + 2]); return seen.size; })()"""
CHARTS = "document.querySelectorAll('.uplot canvas').length"
SKEWED = "const Real = Date; Date = class extends Real { constructor(...a) { super(...(a.length ? a : [-1e14])); } static now() { return -1e14; } };"
MEGABYTE = 2**20


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("reported")
    runs = [
        leave_reported_run(directory / name, steps=60, generators=2, seed=n) for n, name in enumerate(("one", "two"))
    ]
    out = directory / "report.html"
    assert CliRunner().invoke(app, ["report", *map(str, runs), "--out", str(out)]).exit_code == 0
    return out


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1440, 390])
def test_a_page_draws_itself_and_fits(page: Path, width: int, dark: bool):
    paper = "getComputedStyle(document.body).backgroundColor"
    seen = look(page, width=width, dark=dark, before=SKEWED, expressions=[CHARTS, INKED, paper])
    assert seen.said == [] and seen.asked == [] and seen.overflow == 0
    charts, colours, background = seen.results
    assert charts == 6 and colours > 6
    assert (background == "rgb(255, 255, 255)") is not dark


def test_samples_are_searched_sorted_and_compared(page: Path):
    count = "document.querySelectorAll('.sample').length"
    set_to = (
        "(() => {{ const e = document.querySelector('{0}'); e.value = '{1}'; e.dispatchEvent(new Event('{2}')); }})()"
    )
    seen = look(
        page,
        expressions=[
            set_to.format("#samples input", "better answer", "input"),
            count,
            set_to.format(".sample select", "0", "change"),
            "[...document.querySelectorAll('.sample ins')].map((e) => e.textContent).join('')",
            "[...document.querySelectorAll('.sample del')].map((e) => e.textContent).join('')",
            set_to.format("#samples input", "", "input"),
            set_to.format("#samples label:nth-of-type(3) select", "worst reward first", "change"),
            "document.querySelector('.answer p').textContent",
        ],
    )
    assert seen.said == []
    _, found, _, added, gone, _, _, first = seen.results
    assert found == 1 and "better " in added and "last " in added and "first " in gone
    assert first.startswith("reward -1 ")


def test_a_timeline_is_enlarged_and_told(page: Path):
    middle = """(() => { const c = document.querySelector('#timeline canvas'); const y = 24 + 4 + 18 + 9;
    c.dispatchEvent(new PointerEvent('pointermove', { bubbles: true, clientX: c.getBoundingClientRect().left + 700, clientY: c.getBoundingClientRect().top + y }));
    return document.querySelector('.about').textContent; })()"""
    press = "[...document.querySelectorAll('#timeline button')].find((b) => b.textContent === '+').click()"
    seen = look(page, expressions=[middle, press, press, INKED, middle])
    assert seen.said == [] and all(
        text.startswith("generator.0: generate") for text in (seen.results[0], seen.results[4])
    )


@pytest.mark.slow
def test_ten_thousand_steps_of_eight_processes_are_drawn_at_once(tmp_path: Path):
    run = leave_reported_run(tmp_path / "long", steps=10_000, generators=5)  # and learner, learner.0, weights
    out = tmp_path / "report.html"
    assert CliRunner().invoke(app, ["report", str(run), "--out", str(out)]).exit_code == 0
    assert out.stat().st_size < 10 * MEGABYTE
    inside = "performance.now()"
    seen = look(out, expressions=[INKED, CHARTS, inside])
    assert seen.said == [] and seen.overflow == 0 and seen.results[0] > 6 and seen.results[1] == 6
    assert seen.seconds < 30  # 3 on an idle machine; this only says that it does not hang
