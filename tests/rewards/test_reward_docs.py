"""The examples in docs/rewards.md: each is a configuration, and each data file beside one has what its reward reads."""

import re
from pathlib import Path

import pytest
import yaml

from megatron_async_rlhf.config.load import load_config
from megatron_async_rlhf.config.rewards import REWARDS
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.jobs.inputs import check_functions, load_run_inputs, make_model_template

DOCS = Path(__file__).parents[2] / "docs/rewards.md"
EXAMPLES = re.findall(r"```yaml\n(.*?)```(?:\n\n```json\n(.*?)```)?", DOCS.read_text(encoding="utf-8"), re.DOTALL)
MODEL = "model={layers: 2, hidden_size: 64, ffn_size: 96, heads: 2, context_length: 512}"


def types_of(text: str) -> list[str]:
    reward = yaml.safe_load(text)["reward"]
    return [entry["type"] for entry in (reward if isinstance(reward, list) else [reward])]


def loaded(text: str, directory: Path) -> RunConfig:
    path = directory / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, [MODEL, "data.eval_prompts=1"])


def test_every_type_has_an_example():
    assert {kind for text, _ in EXAMPLES for kind in types_of(text)} == set(REWARDS)


@pytest.mark.parametrize("text", [text for text, _ in EXAMPLES], ids=lambda text: "-".join(types_of(text)))
def test_examples_are_configurations(text: str, tmp_path: Path):
    assert [entry.type for entry in loaded(text, tmp_path).rewards] == types_of(text)


@pytest.mark.parametrize(
    ("text", "lines"), [each for each in EXAMPLES if each[1]], ids=["-".join(types_of(t)) for t, d in EXAMPLES if d]
)
def test_the_data_of_examples_have_what_the_reward_reads(
    text: str, lines: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    config = loaded(text, tmp_path)
    Path(config.data.train).write_text(lines, encoding="utf-8")
    make_model_template(config, tmp_path / "template")
    run_inputs = load_run_inputs(config, tmp_path / "template")
    check_functions(config, run_inputs)
    assert len(run_inputs.train) + len(run_inputs.eval) == len(lines.splitlines())
