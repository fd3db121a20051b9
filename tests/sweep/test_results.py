"""Results, table and plot from made-up run directories."""

import json
import math
import random
from pathlib import Path
from statistics import fmean
from xml.etree import ElementTree

import pytest
from browser import assert_fits, needs_chromium
from rich.console import Console

from megatron_async_rlhf.config.load import dump_config
from megatron_async_rlhf.errors import WriteError
from megatron_async_rlhf.sweep.plot import write_plot
from megatron_async_rlhf.sweep.points import Point, Sweep
from megatron_async_rlhf.sweep.report import write_report
from megatron_async_rlhf.sweep.results import Group, collect, grouped, pareto_front, write_results


def leave_run(point: Point, *, status: str = "completed", reward: float = 0.5, losses: list | None = None, **summary):
    """What a finished run leaves: KL of step n is n - 1."""
    directory, schedule = point.config.run.path, point.config.schedule
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(dump_config(point.config))
    losses = losses or [0.1] * schedule.steps
    lines = [{"step": n, "loss": loss, "kl_to_reference": float(n - 1)} for n, loss in enumerate(losses, 1)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    oldest = schedule.mini_batches - 1
    content = {
        "status": status, "error": None, "steps": len(losses), "samples_generated": 2 * len(losses), "wall_seconds": 10.0,
        "startup_seconds": 3.0, "staleness": {"mean": oldest / 2, "max": oldest},
        "eval": {"before": {"reward": 0.25}, "after": {"reward": reward}}, "versions": {"torch": "2.13.0"},
    }  # fmt: skip
    (directory / "summary.json").write_text(json.dumps(content | summary))


def test_a_point_is_summed_up(make):
    sweep = make(schedule={"mode": "sync", "steps": 40})
    fresh, stale, bad, failed, cut, *rest = sweep.points
    leave_run(fresh, reward=0.625)
    leave_run(stale)
    leave_run(bad, losses=[0.1] * 39 + [math.nan])
    leave_run(failed, status="failed", error="learner.0: it went wrong")
    leave_run(cut, status="interrupted")
    results = collect(sweep)
    first = results[0]
    assert (first.name, first.labels) == (fresh.name, fresh.labels)
    assert (first.steps, first.samples, first.seconds, first.startup_seconds) == (40, 80, 10.0, 3.0)
    assert (first.reward_before, first.reward_after) == (0.25, 0.625)
    assert first.kl_to_reference == fmean([36, 37, 38, 39])  # the last tenth
    assert [(r.staleness_mean, r.staleness_max) for r in results[:2]] == [(0.0, 0), (1.5, 3)]
    assert [r.loss_finite for r in results[:3]] == [True, True, False]
    assert [r.status for r in results] == ["completed"] * 3 + ["failed", "interrupted"] + ["to do"] * 3
    assert results[3].error == "learner.0: it went wrong" and results[3].reward_after is None


def test_seeds_are_taken_together(make):
    sweep = make()
    for number, point in enumerate(sweep.points[:6]):
        leave_run(point, reward=number / 10)
    groups = grouped(sweep.section, collect(sweep))
    assert [(g.line, g.staleness, g.rewards, g.points, g.staleness_max) for g in groups] == [
        ("dpo", "updates1", [0.0, 0.4], 2, 0),
        ("dpo", "updates4", [0.1, 0.5], 2, 3),
        ("rloo", "updates1", [0.2], 2, 0),
        ("rloo", "updates4", [0.3], 2, 3),
    ]


def test_a_run_that_measures_no_kl_has_none(make):
    sweep = make({"axes": {"beta": {"algorithm.beta": [0.1]}}})
    leave_run(sweep.points[0])
    path = sweep.points[0].config.run.path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": n, "loss": 0.1}) + "\n" for n in range(1, 9)))
    (result,) = collect(sweep)
    assert result.kl_to_reference is None
    (group,) = grouped(sweep.section, [result])
    assert (group.line, group.staleness, group.kl) == ("beta0.1", "-", [])
    assert pareto_front([group]) == []


def group(kl: float, reward: float) -> Group:
    return Group(line="x", staleness="-", points=1, rewards_before=[], rewards=[reward], kl=[kl], staleness_mean=0.0,
                 staleness_max=0, seconds=1.0)  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
def test_the_front_is_what_nothing_beats(seed: int):
    rng = random.Random(seed)
    groups = [group(rng.randint(0, 6), rng.randint(0, 6)) for _ in range(12)]  # with ties

    def beats(a: Group, b: Group) -> bool:
        return a.kl[0] <= b.kl[0] and a.rewards[0] >= b.rewards[0] and (a.kl, a.rewards) != (b.kl, b.rewards)

    unbeaten = {(g.kl[0], g.rewards[0]) for g in groups if not any(beats(other, g) for other in groups)}
    assert [(g.kl[0], g.rewards[0]) for g in pareto_front(groups)] == sorted(unbeaten)


def test_the_report_is_a_table_a_file_and_a_picture(make, capsys: pytest.CaptureFixture):
    sweep: Sweep = make()
    for number, point in enumerate(sweep.points[:-1]):
        leave_run(point, reward=0.3 + number / 100)
    leave_run(sweep.points[-1], status="failed", error="generator.0 died")
    write_report(Console(width=120, highlight=False), sweep)
    output = capsys.readouterr().out
    assert "0.320 [0.300, 0.340]" in output  # dpo, updates1: points 0 and 4
    assert "rloo-updates4-seed1: failed: generator.0 died" in output
    content = json.loads((sweep.directory / "results.json").read_text())
    assert content["axes"] == {"algorithm": ["dpo", "rloo"], "updates": ["1", "4"], "seed": ["0", "1"]}
    assert content["versions"] == {"torch": ["2.13.0"]}
    assert [point["name"] for point in content["points"]] == [point.name for point in sweep.points]
    assert len(json.dumps(content)) < 1000 * len(sweep.points)
    assert (sweep.directory / "sweep.png").read_bytes().startswith(b"\x89PNG")
    ElementTree.parse(sweep.directory / "sweep.svg")
    page = (sweep.directory / "sweep.html").read_text()
    assert page.count("<svg") == 1 and "<td>0.320 [0.300, 0.340]</td>" in page
    assert all(f"<td>{point.name}</td>" in page for point in sweep.points) and "<td>failed</td>" in page


@needs_chromium
@pytest.mark.xdist_group("browser")
def test_the_page_fits_every_window(make):
    sweep = make()
    for number, point in enumerate(sweep.points):
        leave_run(point, reward=0.3 + number / 100)
    write_report(Console(width=120, highlight=False), sweep)
    assert_fits(sweep.directory / "sweep.html")


def test_nothing_to_show_is_no_picture(tmp_path: Path):
    assert write_plot([], tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_the_picture_shows_every_group(make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: drawn.append(figure))
    sweep = make()
    for number, point in enumerate(sweep.points):
        leave_run(point, reward=0.3 + number / 100)
    groups = grouped(sweep.section, collect(sweep))
    write_plot(groups, tmp_path)
    left, right = drawn[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in left.get_lines() if line.get_label()[0] != "_"}
    assert lines == {
        "dpo": [[0, pytest.approx(0.32)], [3, pytest.approx(0.33)]],
        "rloo": [[0, pytest.approx(0.34)], [3, pytest.approx(0.35)]],
    }
    markers = [line.get_xydata().tolist()[0] for line in right.get_lines() if line.get_marker() == "o"]
    assert markers == [[7.0, pytest.approx(fmean(g.rewards))] for g in groups]  # KL of the last of 8 steps


def test_a_full_disk_is_told_in_one_line(make):
    sweep = make()
    sweep.directory.mkdir(parents=True)
    (sweep.directory / "results.json.partial").symlink_to("/dev/full")
    with pytest.raises(WriteError, match="results.json cannot be written .No space left on device."):
        write_results(sweep, collect(sweep))
