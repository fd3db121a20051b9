"""Comparisons of made-up runs, whose figures are worked out by hand."""

import json
from pathlib import Path

import pytest
from made_runs import leave_run
from msgspec import structs

from megatron_async_rlhf.compare.comparison import compare_runs, to_json
from megatron_async_rlhf.compare.runs import read_run
from megatron_async_rlhf.compare.verdict import verdict_of
from megatron_async_rlhf.errors import ConfigError


def runs_of(tmp_path: Path, *rows: tuple) -> list:
    """Rows of schedule, seed, and the wall clock or more."""
    found = []
    for schedule, seed, figures in rows:
        figures = {"wall_s": figures} if isinstance(figures, float) else figures
        found.append(read_run(leave_run(tmp_path / f"{schedule}-{seed}", schedule, seed, **figures)))
    return found


def test_a_run_is_read(tmp_path: Path):
    run = read_run(leave_run(tmp_path / "a", "alternating", 3, wall_s=100.0, after=0.75))
    assert (run.schedule, run.seed, run.steps, run.samples) == ("alternating", 3, 20, 160)
    assert (run.wall_s, run.generate_s, run.train_s, run.push_s) == (100.0, 40.0, 50.0, pytest.approx(2.0))
    assert (run.before, run.after, run.overlap) == (0.25, 0.75, 0.5)
    assert run.win_rate == (1 + 0.5 + 0 + 0.5) / 4
    assert run.kl_at_end == 19.5 and run.reward_at_end == (19 + 20) / 2 / 20  # a tenth of 20 steps
    assert run.reward_at(50.0) == (9 + 10) / 2 / 20  # half way
    assert run.reward_at(4.9) == run.reward_at(0.0) == 1 / 20


def test_seeds_are_compared_one_by_one(tmp_path: Path):
    runs = runs_of(
        tmp_path,
        ("async", 0, {"wall_s": 50.0, "after": 0.5}),
        ("async", 1, {"wall_s": 60.0, "after": 0.75}),
        ("same_split", 0, {"wall_s": 100.0, "after": 0.5}),
        ("same_split", 1, {"wall_s": 120.0, "after": 0.5}),
    )
    comparison = compare_runs(runs)
    against = comparison.against["same_split"]
    assert against.seeds == [0, 1] and against.speedup.mean == pytest.approx(2.0)
    assert (against.speedup.low, against.speedup.high) == (pytest.approx(2.0), pytest.approx(2.0))
    assert against.time_saved.mean == pytest.approx(0.5)
    assert against.inflation.mean == pytest.approx((50 / 50 * 60 / 50) ** 0.5)  # training takes 50 s in either baseline
    assert against.held_out_reward.mean == pytest.approx(0.125)
    assert against.kl.mean == against.reward_at_equal_samples.mean == 0
    # When the asynchronous run is done, the synchronous one is half way: (19 + 20) / 40 against (9 + 10) / 40.
    assert against.reward_at_equal_time.mean == pytest.approx(0.5)
    figures = comparison.schedules["same_split"]
    assert figures.step_seconds.mean == pytest.approx(5.5) and figures.train_seconds.mean == pytest.approx(2.5)
    assert figures.learner_idle.mean == pytest.approx(1 - (50 / 100 + 50 / 120) / 2)
    assert comparison.pays is True


def test_either_baseline_can_say_no(tmp_path: Path):
    runs = runs_of(tmp_path, ("async", 0, 50.0), ("same_split", 0, 90.0), ("alternating", 0, 50.5))
    comparison = compare_runs(runs)
    assert comparison.against["same_split"].pays is True and comparison.against["alternating"].pays is False
    assert comparison.pays is False
    verdict = verdict_of(comparison)
    assert verdict.startswith("Asynchronous training does not pay. It has 1.80x the speed")
    assert "1.01x" in verdict and "take turns on all devices" in verdict
    assert verdict.count("hiding") == 1 and "each of them has all devices" in verdict
    assert verdict.count("times as long as in a synchronous one.") == 1
    assert verdict.count("times as long as in a synchronous one, where it has all devices.") == 1


@pytest.mark.parametrize(
    ("walls", "afters", "pays"),
    [
        ([(50.0, 90.0), (51.0, 90.0)], [(0.5, 0.5), (0.6, 0.6)], True),
        ([(50.0, 90.0), (51.0, 90.0)], [(0.1, 0.5), (0.101, 0.5)], False),  # faster, and clearly worse
        ([(50.0, 51.0), (50.0, 51.05)], [(0.5, 0.5), (0.6, 0.6)], False),  # hardly faster
        ([(50.0, 50.0), (50.0, 90.0)], [(0.5, 0.5), (0.6, 0.6)], None),
    ],
)
def test_it_pays_if_it_is_faster_and_no_worse(tmp_path: Path, walls, afters, pays: bool | None):
    rows = []
    for seed, (wall, after) in enumerate(zip(walls, afters, strict=True)):
        rows.append(("async", seed, {"wall_s": wall[0], "after": after[0]}))
        rows.append(("same_split", seed, {"wall_s": wall[1], "after": after[1]}))
    assert compare_runs(runs_of(tmp_path, *rows)).pays is pays


def test_of_one_seed_a_lower_reward_decides_nothing(tmp_path: Path):
    for name, wall_s, after, pays in (("a", 90.0, 0.4, None), ("b", 90.0, 0.45, True), ("c", 51.0, 0.4, False)):
        rows = [("async", 0, {"wall_s": 50.0, "after": after}), ("same_split", 0, {"wall_s": wall_s, "after": 0.45})]
        (tmp_path / name).mkdir()
        assert compare_runs(runs_of(tmp_path / name, *rows)).pays is pays


def test_a_reward_that_only_one_of_two_seeds_has_decides_nothing(tmp_path: Path):
    known = [("async", 0, {"wall_s": 50.0, "after": 0.4}), ("same_split", 0, {"wall_s": 90.0, "after": 0.45})]
    unknown = [("async", 1, {"wall_s": 51.0}), ("same_split", 1, {"wall_s": 90.0})]
    runs = runs_of(tmp_path, *known, *unknown)
    comparison = compare_runs([structs.replace(run, after=None) if run.seed else run for run in runs])
    assert comparison.against["same_split"].held_out_reward.seeds == 1
    assert comparison.pays is None


def test_the_reason_is_in_the_sides_times(tmp_path: Path):
    short = {"wall_s": 104.0, "generate_s": 2.0, "train_s": 100.0}
    ours = {"wall_s": 103.0, "generate_s": 2.5, "train_s": 101.0}
    verdict = verdict_of(compare_runs(runs_of(tmp_path, ("async", 0, ours), ("same_split", 0, short))))
    assert verdict.startswith("Asynchronous training does not pay.")
    assert "hiding generation behind training could make it 1.02 times as fast" in verdict
    assert "training, the slower side, works 98% and takes 1.01 times as long" in verdict


def test_it_does_not_pay_if_the_slower_side_alone_takes_nearly_all_of_a_synchronous_run(tmp_path: Path):
    theirs = {"wall_s": 104.0, "generate_s": 2.0, "train_s": 100.0}
    rows = [("async", 0, 95.0), ("same_split", 0, theirs), ("async", 1, 110.0), ("same_split", 1, theirs)]
    comparison = compare_runs(runs_of(tmp_path, *rows))
    against = comparison.against["same_split"]
    assert against.speedup.is_above(1.05) is None  # by what was measured, it may
    assert against.speedup_limit.mean == pytest.approx(1.04)
    assert against.speedup.mean == pytest.approx(against.speedup_limit.mean / against.inflation.mean)
    assert against.pays is False and comparison.pays is False
    verdict = verdict_of(comparison)
    assert "and can have 1.04 (1.04 to 1.04)x at most, below the 1.05x" in verdict and "More seeds" not in verdict


def test_json_has_what_programs_read(tmp_path: Path):
    comparison = compare_runs(runs_of(tmp_path, ("async", 0, 50.0), ("same_split", 0, 100.0)))
    content = json.loads(json.dumps(to_json(comparison, verdict_of(comparison))))
    assert content["speedup"] == {"same_split": {"mean": 2.0, "low": None, "high": None, "seeds": 1}}
    assert content["time_saved"]["same_split"]["mean"] == 0.5
    assert content["verdict"].startswith("Asynchronous training pays.") and content["pays"] is True
    assert content["schedules"]["async"]["learner_idle"]["mean"] == 0.0


def test_seeds_that_only_one_schedule_has_are_left_out_aloud(tmp_path: Path):
    comparison = compare_runs(runs_of(tmp_path, ("async", 0, 50.0), ("async", 7, 50.0), ("same_split", 0, 100.0)))
    assert comparison.against["same_split"].seeds == [0]
    assert comparison.notes == ["async against same_split: only seeds that both have are compared, not 7"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("async", 0, 50.0), ("async", 1, 50.0)], "no seed was run both asynchronously and synchronously .async: seeds .0, 1"),
        ([("async", 0, 50.0), ("same_split", 1, 50.0)], "no seed was run both"),
        ([("async", 0, {}), ("same_split", 0, {"learner": {"learning_rate": 0.5}})], "learner.learning_rate differ"),
        ([("async", 0, {}), ("same_split", 0, {"steps": 10})], "schedule.steps differ"),
        ([("async", 0, {}), ("same_split", 0, {"status": "failed"})], "is not completed .status failed"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused(tmp_path: Path, rows, message: str):
    with pytest.raises(ConfigError, match=message):
        compare_runs(runs_of(tmp_path, *rows))


def test_one_seed_of_one_schedule_is_one_run(tmp_path: Path):
    runs = [read_run(leave_run(tmp_path / name, "async")) for name in ("a", "b")]
    with pytest.raises(ConfigError, match="are both async with seed 0; give one of them"):
        compare_runs(runs)


def test_a_directory_without_a_run_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="is no run's directory"):
        read_run(tmp_path)


def test_times_of_a_resumed_run_of_an_older_version_are_not_known(tmp_path: Path):
    directory = leave_run(tmp_path / "a", "async", steps=3, wall_s=30.0, times=[10.0, 20.0, 30.0])
    path = directory / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        del line["time/elapsed_s"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [moment.seconds for moment in read_run(directory).course] == [10.0, 20.0, 30.0]
    lines[0]["time"] -= 1000
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ConfigError, match="was resumed by a version that did not record time/elapsed_s"):
        read_run(directory)
