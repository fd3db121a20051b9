"""Which stages a pipeline runs, and what it makes of their ends. The commands are stand-ins."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.launch.recipe import Recipe, load_recipe
from megatron_async_rlhf.pipeline.driver import Driver
from megatron_async_rlhf.pipeline.plot import write_plot

STAND_IN = Path(__file__).parents[1] / "sweep" / "stand_in.py"
MODEL = {"layers": 2, "hidden_size": 64, "ffn_size": 96, "heads": 2, "context_length": 96}
STAGES = [
    {"name": "sft", "command": "sft", "config": "base.yaml"},
    {"name": "proxy", "command": "reward-model", "config": "rest.yaml", "set": {"model.hf": "{sft}/final"}},
    {"name": "rl", "command": "train", "config": "rest.yaml", "set": {"model.hf": "{sft}/final", "data.train": "{proxy}/p.jsonl", "reward": {"type": "function", "function": "f.py:g"}}},
]  # fmt: skip


class Rig:
    """A recipe of three stages in a folder, and a stand-in for `async-rlhf`."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.notes = folder, []
        monkeypatch.chdir(folder)
        (folder / "base.yaml").write_text(yaml.safe_dump({"model": MODEL}))
        (folder / "rest.yaml").write_text(yaml.safe_dump({}))
        self.write(STAGES)
        self.behave()

    def write(self, stages: list[dict]) -> None:
        (self.folder / "pipeline.yaml").write_text(yaml.safe_dump({"name": "small", "stages": stages}))

    def behave(self, **by_stage: str) -> None:
        (self.folder / "behaviour.json").write_text(json.dumps(by_stage))

    def load(self, *overrides: str) -> Recipe:
        return load_recipe(self.folder, overrides)

    def drive(self, *overrides: str) -> tuple[int, list[str]]:
        """The exit code, and the calls of this start."""
        path = self.folder / "calls.jsonl"
        before = len(path.read_text().splitlines()) if path.exists() else 0
        driver = Driver(
            self.load(*overrides),
            note=self.notes.append,
            command=[sys.executable, str(STAND_IN), str(self.folder)],
        )
        code = driver.run()
        lines = path.read_text().splitlines() if path.exists() else []
        return code, [" ".join(json.loads(line)) for line in lines[before:]]

    @property
    def record(self) -> dict:
        return json.loads((self.folder / "runs/small/pipeline.json").read_text())


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    return Rig(tmp_path, monkeypatch)


ALL = ["sft sft", "reward-model proxy", "train rl"]


def test_stages_follow_each_other_and_name_earlier_ones(rig: Rig):
    recipe = rig.load()
    assert [stage.needs for stage in recipe.stages] == [[], ["sft"], ["sft", "proxy"]]
    assert recipe.stages[2].config.model.hf == Path("runs/small/sft/final")
    assert recipe.stages[2].config.data.train == "runs/small/proxy/p.jsonl"
    assert rig.drive() == (0, ALL)
    assert {name: rig.record[name]["status"] for name in ("sft", "proxy", "rl")} == dict.fromkeys(
        ("sft", "proxy", "rl"), "completed"
    )
    assert rig.record["rl"]["dir"] == "runs/small/rl" and rig.record["status"] == "completed"
    assert rig.record["sft"]["seconds"] > 0


def test_what_is_done_is_skipped_and_what_was_cut_off_goes_on(rig: Rig):
    rig.behave(rl="interrupt")
    assert rig.drive() == (130, ALL)
    assert (rig.record["status"], rig.record["rl"]["status"]) == ("interrupted", "interrupted")
    rig.behave()
    assert rig.drive() == (0, ["train rl --resume"])
    assert rig.drive() == (0, [])
    assert rig.notes[-3:] == ["[1/3] sft: is done", "[2/3] proxy: is done", "[3/3] rl: is done"]


def test_a_file_asks_it_to_stop(rig: Rig):
    """As the job of a cluster does, whose signals reach other processes."""
    rig.behave(proxy="leave stop")
    assert rig.drive() == (130, ALL[:2])
    assert rig.record["proxy"]["status"] == "interrupted" and not (rig.folder / "runs/small/stop").exists()
    rig.behave()
    assert rig.drive() == (0, ALL[1:])


def test_a_failure_ends_it_and_the_stage_is_made_again(rig: Rig):
    rig.behave(proxy="fail")
    assert rig.drive() == (1, ALL[:2])
    assert "learner.0: it went wrong" in rig.notes[-2]
    assert rig.record["proxy"]["status"] == "failed" and rig.record["rl"]["status"] == "to do"
    rig.behave()
    assert rig.drive() == (0, ALL[1:])


def test_what_read_from_a_stage_that_changed_is_made_again(rig: Rig):
    rig.drive()
    assert rig.drive("rl.schedule.steps=5") == (0, ["train rl"])
    (rig.folder / "runs/small/proxy/summary.json").write_text(json.dumps({"status": "completed", "other": 1}))
    assert rig.drive("rl.schedule.steps=5") == (0, ["train rl"])
    assert rig.drive("rl.schedule.steps=5", "sft.run.seed=3")[1][:1] == ["sft sft"]


def test_what_an_earlier_making_left_is_not_taken_for_this_one(rig: Rig):
    """A check refuses the stage before it makes its directory anew."""
    rig.drive()
    (rig.folder / "runs/small/proxy/summary.json").write_text(json.dumps({"status": "completed", "other": 1}))
    rig.behave(rl="refuse")
    assert rig.drive() == (1, ["train rl"])
    rig.behave()
    assert rig.drive() == (0, ["train rl"])
    assert rig.drive() == (0, [])


def test_a_failure_that_has_saved_continues(rig: Rig):
    rig.behave(rl="fail")
    assert rig.drive() == (1, ALL)
    (rig.folder / "runs/small/rl/checkpoints/step_000004").mkdir(parents=True)
    rig.behave()
    assert rig.drive() == (0, ["train rl --resume"])


def test_a_record_that_was_not_finished_is(rig: Rig):
    rig.drive()
    path = rig.folder / "runs/small/pipeline.json"
    record = rig.record
    record["rl"]["status"] = record["status"] = "running"
    path.write_text(json.dumps(record))
    assert rig.drive() == (0, [])
    assert (rig.record["rl"]["status"], rig.record["status"]) == ("completed", "completed")


def test_figures_of_stages_are_repeated(rig: Rig):
    rig.write([*STAGES, {"name": "eval", "command": "eval", "config": "rest.yaml", "set": {"model.hf": "{rl}/final"}}])
    rig.drive()
    runs = rig.folder / "runs/small"
    (runs / "eval/eval.json").write_text(
        json.dumps({"wins": {"win_rate": {"mean": 0.7, "low": 0.6, "high": 0.8, "n": 9}}})
    )
    accuracy = {"accuracy": 0.9, "accuracy_low": 0.8, "accuracy_high": 0.95}
    (runs / "proxy/summary.json").write_text(json.dumps({"status": "completed", "eval": {"after": accuracy}}))
    rig.drive()
    assert rig.record["eval"]["win_rate"] == {"mean": 0.7, "low": 0.6, "high": 0.8}
    assert rig.record["proxy"]["accuracy"] == {"mean": 0.9, "low": 0.8, "high": 0.95}


def test_rewards_with_parts_are_drawn(rig: Rig):
    rig.drive()
    recipe, run = rig.load(), rig.folder / "runs/small/rl"
    assert write_plot(recipe) is None
    steps = [
        {"step": n, "reward/proxy": 0.1 * n, "reward/gold": 0.05 * n, "kl_to_reference": 0.01 * n} for n in (1, 2, 3)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    path = write_plot(recipe)
    assert path is not None and path.read_bytes().startswith(b"\x89PNG")


def test_a_stage_is_named_inside_of_lists_and_sections_too(rig: Rig):
    rewards = [{"type": "builtin"}, {"type": "reward_model", "name": "learned", "model": "{proxy}/final"}]
    rig.write([*STAGES[:2], STAGES[2] | {"set": {"model.hf": "{sft}/final", "reward": rewards}}])
    stage = rig.load().stages[2]
    assert stage.needs == ["sft", "proxy"]
    assert stage.config.rewards[1].model == Path("runs/small/proxy/final")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"set": {"reward": {"type": "reward_model", "model": "{prxy}/final"}}}, r"\{prxy\} is no earlier stage; did you mean proxy"),
        ({"set": {"model.hf": "{stf}/final"}}, r"rl: set.model.hf = \{stf\}/final: \{stf\} is no earlier stage; did you mean sft"),
        ({"set": {"model.hf": "{rl}/final"}}, r"\{rl\} is no earlier stage"),
        ({"name": "sft"}, "the stage sft must have another name"),
        ({"name": "logs"}, "the stage logs must have another name"),
        ({"command": "tune"}, "stages"),
        ({"config": "nowhere.yaml"}, "rl: config file .*nowhere.yaml does not exist"),
        ({"set": {"model.hf": "x", "schedule.stepz": 3}}, "rl: schedule.stepz"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_recipe_is_one_line(rig: Rig, change: dict, line: str):
    rig.write([*STAGES[:2], STAGES[2] | change])
    with pytest.raises(ConfigError, match=line) as error:
        rig.load()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "line"),
    [("schedule=3", "must look like stage.section.key=value"), ("rll.run.seed=1", "did you mean rl")],
)
def test_an_override_names_its_stage(rig: Rig, override: str, line: str):
    with pytest.raises(ConfigError, match=line):
        rig.load(override)


@pytest.mark.parametrize(
    "recipe",
    sorted((Path(__file__).parents[2] / "examples").glob("*/pipeline.yaml")),
    ids=lambda path: path.parent.name,
)
def test_the_recipes_load(recipe: Path):
    loaded = load_recipe(recipe.parent)
    assert loaded.name == recipe.parent.name
    used = {recipe.name, *(stage["config"] for stage in yaml.safe_load(recipe.read_text())["stages"])}
    assert {path.name for path in recipe.parent.glob("*.yaml")} == used, "a file of no stage"
