"""The reference of all keys: made from the classes, and as it is in docs/configuration.md."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_async_rlhf.cli import app
from megatron_async_rlhf.config.data import DataSection
from megatron_async_rlhf.config.described import meanings
from megatron_async_rlhf.config.reference import described_sections, json_schema, markdown
from megatron_async_rlhf.config.sections import GeneratorSection, LearnerSection, WarmStartSection

PAGE = Path(__file__).parents[2] / "docs/configuration.md"
KEYS = {key.key: key for section in described_sections() for key in section.keys}


def test_the_page_is_what_the_classes_say():
    assert markdown() in PAGE.read_text(encoding="utf-8"), (
        "make it anew: python -m megatron_async_rlhf.config.reference"
    )


def test_of_every_key_it_is_known_which_version_had_it_first():
    """A new key goes into config/since.yaml, under the version that is being made."""
    assert [key for key, described in KEYS.items() if described.since == "?"] == []


def test_meanings_are_the_comments_of_keys():
    assert meanings(DataSection)["bad_records"] == "and to records that are empty or malformed"
    assert (
        meanings(GeneratorSection)["eval_temperature"] == "of the held-out evaluation; default temperature, 0 is greedy"
    )
    above = meanings(LearnerSection)["peak_tflops"]
    assert above.startswith("TFLOP/s one rank's device could do") and above.endswith("none for a CPU")
    assert "weight_decay" not in meanings(LearnerSection)
    assert meanings(WarmStartSection)["clip_grad"] == meanings(LearnerSection)["clip_grad"]  # of their base


@pytest.mark.parametrize(
    ("key", "kind", "default"),
    [
        ("schedule.max_staleness", "whole number or null, at least 0", "1"),
        ("learner.optimizer_offload", "number, at least 0, at most 1", "0.0"),
        ("learner.precision", "`fp32`, `bf16`", "fp32"),
        ("data.reference_fields", "list of text", "[]"),
        ("model.hf", "path or null", "null"),
        ("telemetry.tensorboard", "true or false", "false"),
        ("reward.range", "[number, number]", "[1.0, 10.0]"),
        ("weights.timeout_s", "number, above 0, s", "120.0"),
        ("launch.network_gbit_s", "number, above 0, Gbit/s", "400.0"),
    ],
)
def test_values_are_said_in_words(key: str, kind: str, default: str):
    assert (KEYS[key].kind, KEYS[key].default) == (kind, default)


def test_the_schema_has_every_key_and_what_it_means():
    schema = json_schema()
    assert (
        schema["$defs"]["GeneratorSection"]["properties"]["max_concurrent"]["description"]
        == "sequences a replica decodes at once"
    )
    assert {"run", "model", "learner", "generator", "schedule", "algorithm", "reward"} <= set(schema["properties"])


def test_the_command_writes_it(tmp_path):
    result = CliRunner().invoke(app, ["schema", "--out", str(tmp_path / "s.json")])
    assert result.exit_code == 0 and json.loads((tmp_path / "s.json").read_text()) == json_schema()
    assert json.loads(CliRunner().invoke(app, ["schema"]).output) == json_schema()


def test_the_version_is_said():
    from megatron_async_rlhf import __version__

    assert CliRunner().invoke(app, ["--version"]).output == f"megatron_async_rlhf {__version__}\n"
