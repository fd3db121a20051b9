"""What a sweep section stands for, and what of it is refused before anything starts."""

from collections import Counter
from pathlib import Path

import pytest

from megatron_async_rlhf.config.load import dump_config, load_config, read_tree
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.sweep.points import expand
from megatron_async_rlhf.sweep.preflight import check_points

EXAMPLES = Path(__file__).parents[2] / "examples"


def refused(action) -> list[str]:
    with pytest.raises(ConfigError) as error:
        action()
    return str(error.value).splitlines()


def test_every_choice_meets_every_other_seed_by_seed(make):
    names = [point.name for point in make().points]
    assert names == [
        "dpo-updates1-seed0", "dpo-updates4-seed0", "rloo-updates1-seed0", "rloo-updates4-seed0",
        "dpo-updates1-seed1", "dpo-updates4-seed1", "rloo-updates1-seed1", "rloo-updates4-seed1",
    ]  # fmt: skip


def test_a_point_is_an_ordinary_run_from_the_shared_start(make, tmp_path: Path):
    sweep = make()
    point = sweep.points[-1]
    config = point.config
    assert point.labels == {"algorithm": "rloo", "updates": "4", "seed": "1"}
    assert (config.algorithm.type, config.schedule.mini_batches, config.run.seed) == ("proximal_rloo", 4, 1)
    assert config.run.path == tmp_path / "sweep" / "rloo-updates4-seed1"
    assert (config.warm_start.steps, config.sweep) == (0, None)
    assert config.model.hf == sweep.warm_start.run.path / "checkpoints/final"
    assert sweep.warm_start.warm_start.steps == 5
    assert {p.config.model.hf for p in sweep.points} == {config.model.hf}
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config


def test_without_a_warm_start_points_keep_the_model(make):
    sweep = make({"axes": {"size": {"model.layers": [2, 4]}}}, warm_start={"steps": 0})
    assert sweep.warm_start is None
    assert [point.config.model.layers for point in sweep.points] == [2, 4]


def test_the_starts_directory_follows_what_the_start_depends_on(make):
    own = make().warm_start.run.path
    assert make(learner={"learning_rate": 1e-5}).warm_start.run.path == own
    for changed in ({"warm_start": {"steps": 6}}, {"data": {"train_prompts": 64}}):
        assert make(**changed).warm_start.run.path != own


def test_a_key_with_values_is_short_for_labels_with_overrides(make):
    short = make({"axes": {"beta": {"algorithm.beta": [0.1, 0.25]}}})
    long = make({"axes": {"beta": {0.1: {"algorithm.beta": 0.1}, "0.25": {"algorithm.beta": 0.25}}}})
    assert short.points == long.points
    assert [point.name for point in short.points] == ["beta0.1", "beta0.25"]


@pytest.mark.parametrize(
    ("rules", "left"),
    [
        ([{"algorithm": "rloo"}], {("dpo", "1"), ("dpo", "4")}),
        ([{"algorithm": "rloo", "updates": 4}], {("dpo", "1"), ("dpo", "4"), ("rloo", "1")}),
        ([{"algorithm": ["dpo", "rloo"], "updates": [1]}], {("dpo", "4"), ("rloo", "4")}),
        ([{"algorithm": "dpo", "updates": 1}, {"algorithm": "rloo", "updates": 4}], {("dpo", "4"), ("rloo", "1")}),
    ],
)
def test_skip_leaves_out_what_fits_a_rule_on_every_axis_it_names(make, rules: list, left: set):
    found = Counter((p.labels["algorithm"], p.labels["updates"]) for p in make({"skip": rules}).points)
    assert found == dict.fromkeys(left, 2)  # two seeds each


def test_axes_are_told_apart_by_what_they_set(make):
    section = make().section
    assert (section.seed_axes, section.staleness_axes, section.line_axes) == (["seed"], ["updates"], ["algorithm"])


@pytest.mark.parametrize(
    ("sweep", "named"),
    [
        ({"axes": {}}, ["sweep.axes"]),
        ({"axes": {"seed": 5}}, ["axis seed = 5", "{key: [values]}"]),
        ({"axes": {"seed": {}}}, ["sweep.axes.seed", "no choices"]),
        ({"axes": {"seed": {"run.seed": []}}}, ["sweep.axes.seed", "no choices"]),
        ({"axes": {"seed": {"run.seed": [1, 1]}}}, ["axis seed", "twice"]),
        ({"axes": {"seed": {"run.seed": [0], "schedule.steps": [8]}}}, ["axis seed", "only key"]),
        ({"axes": {"data": {"data.train": ["a/b.jsonl"]}}}, ["'a/b.jsonl'", "label: {key: value}"]),
        ({"axes": {"name": {"run.name": ["a"]}}}, ["run.name", "the sweep sets itself"]),
        ({"axes": {"x": {"a": 5}}}, ["sweep.axes.x.a = 5", "mapping"]),
        ({"skip": [{"algoritm": "dpo"}]}, ["sweep.skip", "no axis algoritm", "algorithm, updates, seed"]),
        ({"skip": [{"updates": 3}]}, ["sweep.skip", "axis updates has no 3", "1, 4"]),
        ({"skip": [{}]}, ["sweep.skip", "empty rule"]),
        ({"skip": [{"seed": [0, 1]}]}, ["sweep.skip leaves out every combination"]),
        ({"point_timeout_s": 0}, ["sweep.point_timeout_s = 0"]),
        ({"axis": {}}, ["sweep.axis", "no such key", "axes"]),
        ({"axes": {"size": {"model.layers": [2, 4]}}}, ["sets model.layers", "warm_start.steps = 0"]),
        ({"axes": {"a": {"x": {}}, "b": {"a-x": {}}, "c": {"x-a": {}}}}, []),
    ],
)
def test_a_bad_section_is_one_line(make, sweep: dict, named: list[str]):
    if not named:
        assert [point.name for point in make(sweep).points] == ["x-a-x-x-a"]
        return
    (line,) = refused(lambda: make(sweep))
    for part in named:
        assert part in line


def test_two_points_of_one_name_are_refused(make):
    axes = {"a": {"x": {}, "x-y": {}}, "b": {"y-z": {}, "z": {}}}
    assert "two points would be called x-y-z" in refused(lambda: make({"axes": axes}))[0]


def test_a_config_without_the_section_is_refused(tree):
    sections = tree()
    del sections["sweep"]
    assert refused(lambda: expand(sections)) == [
        "sweep: missing; give the configuration a sweep section, as in examples/sweep.yaml"
    ]


def test_every_point_that_cannot_run_has_a_line_of_its_own(make):
    axes = {"updates": {"schedule.mini_batches": [1, 3, 5]}, "seed": {"good": {"run.seed": 0}, "bad": {"run.seed": -1}}}
    lines = refused(lambda: make({"axes": axes}))
    assert [line.split(": ")[0] for line in lines] == [
        "updates3-good", "updates5-good", "updates1-bad", "updates3-bad", "updates5-bad",
    ]  # fmt: skip
    assert "schedule.steps = 8 is not a multiple of mini_batches x epochs = 3" in lines[0]
    assert "run.seed = -1" in lines[3] and "schedule.steps" in lines[3]


def test_only_chooses_points(make):
    sweep = make({"skip": [{"algorithm": "rloo", "updates": 4}]})
    chosen = sweep.only({"algorithm": ["rloo"], "seed": ["0", "1"]})
    assert [point.name for point in chosen] == ["rloo-updates1-seed0", "rloo-updates1-seed1"]
    assert sweep.only({}) == sweep.points
    assert "there is no axis x" in refused(lambda: sweep.only({"x": ["1"]}))[0]
    assert "leaves out every point" in refused(lambda: sweep.only({"algorithm": ["rloo"], "updates": ["4"]}))[0]


def test_points_are_checked_against_the_model_and_the_data(make):
    axes = {"length": {"generator.max_new_tokens": [12, 80, 96]}, "seed": {"run.seed": [0, 1]}}
    sweep = make({"axes": axes})
    lines = refused(lambda: check_points(sweep, sweep.points))
    assert [line.split(": ")[0] for line in lines] == ["length80-seed0", "length96-seed0"]  # seeds are alike in this
    check_points(sweep, sweep.only({"length": ["12"]}))
    assert not sweep.directory.exists()


def test_points_of_different_models_are_checked_each_against_its_own(make):
    axes = {"ranks": {"learner.tensor_parallel": [1, 4]}, "heads": {"model.heads": [2, 4]}}
    sweep = make({"axes": axes}, warm_start={"steps": 0}, generator={"max_new_tokens": 12},
                 model={"layers": 2, "hidden_size": 128, "ffn_size": 96, "heads": 4, "context_length": 96})  # fmt: skip
    (line,) = refused(lambda: check_points(sweep, sweep.points))
    assert line.startswith("ranks4-heads2: learner.tensor_parallel = 4")


@pytest.mark.parametrize(
    ("name", "axis", "oldest"),
    [("sweep", "updates", {1: 0, 2: 1, 4: 3, 8: 7, 16: 15}), ("sweep_corrections", "ahead", {1: 1, 4: 7, 8: 15})],
)
def test_the_examples_compare_like_with_like(name: str, axis: str, oldest: dict[int, int]):
    sweep = expand(read_tree(EXAMPLES / f"{name}.yaml"))
    check_points(sweep, sweep.only({"seed": ["0"]}))
    schedules = [point.config.schedule for point in sweep.points]
    samples = {s.steps * s.prompts_per_step * p.config.algorithm.samples_per_prompt
               for s, p in zip(schedules, sweep.points, strict=True)}  # fmt: skip
    assert len(samples) == 1
    assert min(s.rollouts for s in schedules) >= 4
    bounds = {p.labels[axis]: s.staleness_bound + s.updates_per_rollout - 1
              for s, p in zip(schedules, sweep.points, strict=True)}  # fmt: skip
    assert bounds == {str(label): age for label, age in oldest.items()}
    assert {p.config.run.seed for p in sweep.points} == {0, 1, 2}
    assert (sweep.section.seed_axes, sweep.section.staleness_axes) == (["seed"], [axis])
