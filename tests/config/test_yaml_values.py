"""What YAML silently makes of what people write: the right value instead, for each type of key."""

from pathlib import Path

import pytest
import yaml

from megatron_async_rlhf.config.load import dump_config, load_config
from megatron_async_rlhf.config.schema import section_at, types_at
from megatron_async_rlhf.config.telemetry import WandbKeys
from megatron_async_rlhf.config.yaml_values import parse_value
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.launch.stages import expand_stages
from megatron_async_rlhf.suggestions import closest
from megatron_async_rlhf.sweep.points import expand

RIGHT = [
    # how it is written, where, and what is meant
    ("run.name", "2026-11-26", "2026-11-26"),
    ("run.name", "2026-11-26T10:00:00Z", None),  # no name, but not a date either
    ("run.name", "no", "no"),
    ("run.name", "On", "On"),
    ("run.name", "true", "true"),
    ("run.name", "007", "007"),
    ("run.name", "1e5", "1e5"),
    ("run.name", "1.10", "1.10"),
    ("run.name", "1_000", "1_000"),
    ("run.name", "0x1F", "0x1F"),
    ("data.prompt_field", "5", "5"),
    ("data.solution_field", "off", "off"),
    ("data.solution_field", "null", None),
    ("data.train", "12", "12"),
    ("run.dir", "2024", Path("2024")),
    ("launch.slurm.time", "12:30:00", "12:30:00"),
    ("launch.slurm.time", "45", "45"),
    ("launch.slurm.memory", "0", "0"),
    ("launch.slurm.account", "1234", "1234"),
    ("launch.slurm.environment", "{OMP_NUM_THREADS: 1, NO: yes}", {"OMP_NUM_THREADS": "1", "NO": "yes"}),
    ("launch.slurm.sbatch", "{requeue: yes, nice: 5}", {"requeue": True, "nice": 5}),
    ("telemetry.wandb.tags", "[1, 2.50, no]", ["1", "2.50", "no"]),
    ("weights.verify", "off", "off"),
    ("schedule.in_flight_updates", "off", "none"),
    ("schedule.steps", "1e1", 10),
    ("schedule.steps", "1_000", 1000),
    ("schedule.steps", "0x10", 16),
    ("schedule.steps", "+5", 5),
    ("learner.learning_rate", "1e-6", 1e-6),
    ("learner.learning_rate", "3E-6", 3e-6),
    ("learner.learning_rate", ".5", 0.5),
    ("launch.pin_cores", "off", False),
    ("launch.pin_cores", "Yes", True),
    ("learner.precision", "bfloat16", "bf16"),
    ("learner.precision", "torch.float32", "fp32"),
    ("generator.dtype", "bf16", "bfloat16"),
    ("generator.dtype", "FP32", "float32"),
]


@pytest.mark.parametrize(("key", "written", "meant"), RIGHT, ids=[f"{key}={written}" for key, written, _ in RIGHT])
def test_a_value_is_what_its_key_wants(load, tmp_path: Path, key: str, written: str, meant: object):
    """In the file and as an override alike, and again when the resolved configuration is read."""
    section, _, rest = key.partition(".")
    nested = written
    for part in reversed(rest.split(".")):
        nested = f"{{{part}: {nested}}}"
    if written.endswith("Z"):
        assert parse_value(written, ("run", "name")) == written
        return
    others = ("data.train=t.jsonl", "data.solution_field=answer", "reward.type=gsm8k") if section == "data" else ()
    own = [override for override in others if not override.startswith(f"{key}=")]
    if (key, meant) == ("data.solution_field", None):
        own = []  # of the built-in task
    path = tmp_path / "written.yaml"
    path.write_text(yaml.safe_dump({"model": load().model.model_dump(exclude_none=True)}) + f"{section}: {nested}\n")
    for config in (load_config(path, own), load(f"{key}={written}", *own)):
        found = config
        for part in key.split("."):
            found = getattr(found, part)
        assert (found, type(found)) == (meant, type(meant))
        again = tmp_path / "again.yaml"
        again.write_text(dump_config(config))
        assert load_config(again) == config


def test_an_alias_is_a_copy(tmp_path: Path, load):
    """An override changes one of the places only."""
    path = tmp_path / "c.yaml"
    model = yaml.safe_dump({"model": load().model.model_dump(exclude_none=True)})
    path.write_text(f"{model}learner: &rates {{weight_decay: 0.1, adam_beta2: 0.9}}\nwarm_start: *rates\n")
    config = load_config(path, ["learner.weight_decay=0.5"])
    assert (config.learner.weight_decay, config.warm_start.weight_decay, config.warm_start.adam_beta2) == (
        0.5,
        0.1,
        0.9,
    )


def test_a_merge_key_gives_way_to_the_mappings_own_keys():
    text = "a: &a {x: 1, y: 1}\nb: &b {y: 2, z: 2}\nc: {y: 9, <<: [*a, *b]}\nd: {<<: *a}\n"
    tree = parse_value(text)
    assert tree["c"] == {"x": 1, "y": 9, "z": 2} and tree["d"] == {"x": 1, "y": 1}


def test_an_empty_section_is_one_of_defaults_and_an_optional_one_is_off(tmp_path: Path, load):
    path = tmp_path / "c.yaml"
    model = yaml.safe_dump({"model": load().model.model_dump(exclude_none=True)})
    path.write_text(f"{model}learner:\n  # threads: 2\nalgorithm:\ntelemetry:\n  wandb:\n")
    assert load_config(path) == load()


def test_values_that_a_sweep_moves_are_what_their_keys_want(tmp_path: Path, load):
    path = tmp_path / "c.yaml"
    model = yaml.safe_dump({"model": load().model.model_dump(exclude_none=True)})
    path.write_text(
        f"{model}sweep:\n  axes:\n    verify: {{weights.verify: [every, off]}}\n    lr: {{a: {{learner.learning_rate: 1e-6}}}}\n"
    )
    points = expand(parse_value(path.read_text())).points
    assert [(point.name, point.config.weights.verify) for point in points] == [("every-a", "every"), ("off-a", "off")]
    assert points[0].config.learner.learning_rate == 1e-6


def test_an_address_in_a_section_that_might_be_a_list_is_text():
    """Not a key that lacks the space after its colon."""
    tree = parse_value("reward:\n  type: judge\n  url: http://localhost:8000/v1\n")
    assert tree["reward"]["url"] == "http://localhost:8000/v1"
    assert parse_value("reward: [{type: judge, url: http://localhost/v1}]")["reward"][0]["url"] == "http://localhost/v1"
    with pytest.raises(ConfigError, match="reward = type:gsm8k lacks the space"):
        parse_value("reward: type:gsm8k")


def test_stages_get_what_was_written(tmp_path: Path, load):
    """A stage's configuration is written out and read again."""
    tree = parse_value("run: {name: 2026-11-26}\ndata: {train: t.jsonl, solution_field: no}\nreward: {type: gsm8k}\n")
    tree["model"] = load().model.model_dump(exclude_none=True)
    (stage,) = expand_stages(tree, ["train"], directory=tmp_path)
    assert parse_value(stage.config)["run"]["name"] == "2026-11-26"
    assert parse_value(stage.config)["data"]["solution_field"] == "no"


@pytest.mark.parametrize(
    ("given", "names", "meant"),
    [
        ("lr", ["learning_rate", "lr_decay", "layers"], "learning_rate"),
        ("tp", ["tensor_parallel", "pipeline_parallel"], "tensor_parallel"),
        ("Steps", ["steps", "epochs"], "steps"),
        ("max-staleness", ["max_staleness"], "max_staleness"),
        ("rate", ["learning_rate", "steps"], "learning_rate"),
        ("rate", ["learning_rate", "min_learning_rate"], None),
        ("bf16", ["bfloat16", "float32"], "bfloat16"),
        ("steps", ["epochs", "window"], None),
        ("", ["steps"], None),
    ],
)
def test_what_was_meant(given: str, names: list[str], meant: str | None):
    assert closest(given, names) == meant


def test_the_schema_is_found_by_location():
    assert types_at(("learner", "ranks")) == [int, type(None)]
    assert types_at(("telemetry", "wandb", "tags", 3)) == [str]
    assert types_at(("sweep", "axes", "a", "label", "schedule.steps")) == [int]
    assert types_at(("sweep", "axes", "a", "schedule.steps", 0)) == [int]
    assert types_at(("nonsense", "x")) == []
    assert section_at(("telemetry", "wandb")) is WandbKeys
