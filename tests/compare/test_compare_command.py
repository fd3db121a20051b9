"""`async-rlhf compare` on made-up runs, and what it plans."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from browser import assert_fits, needs_chromium
from made_runs import leave_run
from small_config import SECTIONS
from typer.testing import CliRunner

from megatron_async_rlhf.cli import app
from megatron_async_rlhf.compare.making import completed_runs, planned_runs
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.usage import run_command_line


@pytest.fixture
def config(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "task.yaml"
    path.write_text(yaml.safe_dump(SECTIONS | {"run": {"name": "task"}, "schedule": {"steps": 20}}))
    return path


class Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attributes) -> None:
        if tag not in ("meta", "br", "img", "path", "use", "rect"):
            self.open.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href") and not value.startswith("#")]

    def handle_endtag(self, tag) -> None:
        if tag in self.open:
            assert self.open.pop() == tag


def test_given_runs_are_reported_on(tmp_path: Path):
    directories = [
        leave_run(tmp_path / f"{schedule}-{seed}", schedule, seed, wall_s=wall_s + seed)
        for schedule, wall_s in (("async", 52.0), ("same_split", 97.0), ("alternating", 80.0))
        for seed in (0, 1)
    ]
    result = CliRunner().invoke(app, ["compare", *map(str, directories), "--out", str(tmp_path / "report")])
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "report" / "compare.json").read_text())
    assert set(content["speedup"]) == {"same_split", "alternating"}
    assert content["speedup"]["same_split"]["mean"] == pytest.approx((97 / 52 * 98 / 53) ** 0.5)
    assert content["verdict"] in result.output.replace("\n", " ")
    page = (tmp_path / "report" / "compare.html").read_text()
    tags = Tags(page)
    assert tags.open == [] and tags.links == []  # well-formed, and needs no other file
    assert content["verdict"] in re.sub("&#39;", "'", page) and "<svg" in page
    assert (tmp_path / "report" / "compare.png").read_bytes().startswith(b"\x89PNG")


@needs_chromium
@pytest.mark.xdist_group("browser")
def test_the_page_fits_every_window(tmp_path: Path):
    made = [("async", 52.0), ("same_split", 97.0), ("alternating", 80.0)]
    runs = [
        leave_run(tmp_path / f"{schedule}-{seed}", schedule, seed, wall_s=wall)
        for schedule, wall in made
        for seed in (0, 1)
    ]
    out = tmp_path / "report"
    assert CliRunner().invoke(app, ["compare", *map(str, runs), "--out", str(out)]).exit_code == 0
    assert_fits(out / "compare.html")


def test_a_configuration_is_planned_for_both_baselines(config: Path):
    plan = planned_runs([config], [], "0,2", [], weights=False)
    assert plan.directory == Path("runs/task-compare")
    facts = [
        (point.name, point.config.run.seed, point.config.schedule.mode, point.config.launch.cores)
        for point in plan.points
    ]
    assert facts == [
        (f"{schedule}-seed{seed}", seed, mode, cores)
        for seed in (0, 2)
        for schedule, mode, cores in (("async", "async", "split"), ("same_split", "sync", "split"), ("alternating", "sync", "shared"))
    ]  # fmt: skip


def test_what_was_made_before_is_reported(config: Path):
    plan = planned_runs([config], [], "0", ["same_split"], weights=False)
    for point in plan.points:
        leave_run(point.config.run.path, point.labels["schedule"])
        (point.config.run.path / "config.yaml").write_text(yaml.safe_dump(point.config.model_dump(mode="json")))
    assert [run.schedule for run in completed_runs(plan)] == ["async", "same_split"]
    result = CliRunner().invoke(
        app, ["compare", str(config), "--seeds", "0", "--baseline", "same_split", "--report-only"]
    )
    assert result.exit_code == 0, result.output
    assert (plan.directory / "compare.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0,x"], "--seeds 0,x: must be different whole numbers, such as 0,1,2"),
        (["--seeds", "1,1"], "--seeds 1,1: must be different"),
        (["--baseline", "other"], "--baseline other: must be same_split or alternating"),
        (["-s", "schedule.max_staleness=0"], "nothing overlaps, so there is nothing to compare"),
        (["-s", "sweep={axes: {seed: {run.seed: [0]}}}"], "has a sweep section"),
        (["--report-only"], "there are no runs to compare"),
        (
            ["--dry-run", "--baseline", "same_split", "-s", "reward.type=gsm8k", "-s", "data.train=missing.jsonl"],
            "missing.jsonl",
        ),
    ],
)
def test_bad_requests_are_one_line(config: Path, arguments: list[str], message: str, capsys):
    assert run_command_line(app, ["compare", str(config), *arguments]) == 2
    output = capsys.readouterr().err
    assert message in output and len(output.strip().splitlines()) == 1


def test_runs_and_a_configuration_do_not_mix(config: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="give one configuration, or directories of completed runs, not both"):
        planned_runs([config, leave_run(tmp_path / "a", "async")], [], "0", [], weights=False)


def test_gpus_that_are_not_shared_have_one_baseline(config: Path, capsys):
    gpus = ["run.device=cuda", "weights.transport=nccl", "learner.precision=bf16"]
    plan = planned_runs([config], gpus, "0", [], weights=False)
    assert [point.labels["schedule"] for point in plan.points] == ["async", "same_split"]
    assert "warning: alternating: sharing GPUs" in capsys.readouterr().err
    shared = planned_runs([config], [*gpus, "weights.transport=ipc"], "0", [], weights=False)
    assert [point.labels["schedule"] for point in shared.points] == ["async", "alternating"]
