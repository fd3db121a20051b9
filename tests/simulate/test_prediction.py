"""Predictions: a dry run and `simulate` say the same, and how far off they are known to be."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_async_rlhf.cli import app
from megatron_async_rlhf.config.load import load_config
from megatron_async_rlhf.simulate import prediction
from megatron_async_rlhf.simulate.lengths import ConstantLength, MeasuredLengths
from megatron_async_rlhf.simulate.prediction import alone, estimated_scenario, predict, shape_of, sized, slowed
from megatron_async_rlhf.simulate.scenario import Scenario, Speeds

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch):
    """Where the examples' paths start."""
    monkeypatch.chdir(ROOT)


def output(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output


def verdicts(text: str) -> list[str]:
    return re.findall(r"[\d.]+ times as fast as the synchronous schedule .*", text)


@pytest.mark.parametrize(
    ("example", "overrides"),
    [
        ("quickstart.yaml", []),
        ("llama8b_async.yaml", ["schedule.prompts_per_step=64"]),
        ("llama8b_async.yaml", ["schedule.generation=streaming", "launch.gpu=a100", "generator.replicas=2"]),
        ("quickstart.yaml", ["schedule.mini_batches=2", "schedule.max_staleness=2", "algorithm={type: ppo}"]),
    ],
)
def test_a_dry_run_and_simulate_say_the_same(example, overrides):
    flags = [part for override in overrides for part in ("-s", override)]
    planned = output("train", f"examples/{example}", "--dry-run", *flags)
    simulated = output("simulate", f"examples/{example}", *flags)
    (verdict,), (error,) = verdicts(simulated), re.findall("known error: .*", simulated)
    assert verdicts(planned) == [verdict]
    assert error in planned


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("generator.request_timeout_s=2", r"speed: not predicted, .* fails when it is simulated: .*request_timeout_s"),
        ("schedule.prompts_per_step=16384", r"speed: not predicted here, for a rollout has 32,768 completions"),
    ],
)
def test_a_dry_run_goes_on_where_nothing_can_be_predicted(override, line):
    assert re.search(line, output("train", "examples/llama8b_async.yaml", "--dry-run", "-s", override))


def test_the_known_error_is_what_the_model_makes_of_the_run_that_was_measured():
    config = load_config(EXAMPLES / "quickstart.yaml")
    scenario, _ = estimated_scenario(config, shape_of(config))
    where, measured = prediction.MEASURED
    assert where.startswith("examples/quickstart.yaml")
    predicted = predict(sized(config), scenario).speedup
    assert round(predicted, 2) == prediction.PREDICTED, "tell PREDICTED"
    assert abs(predicted / measured - 1) < 0.1
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.search(rf"takes\s+{measured:.2f}\s+times\s+as\s+long", readme)
    assert re.search(rf"a ratio of\s+{prediction.PREDICTED:.2f}\.", readme)


@pytest.mark.parametrize(("generate_s", "train_s"), [(2.0, 1.0), (1.0, 2.0), (1.0, 1.0), (3.0, 0.0)])
def test_sides_that_work_at_once_slow_each_other_down(generate_s, train_s):
    one = Speeds(token_s=0.01, sequence_s=0.001, train_s=train_s, train_token_s=0.0, contention=1.2)
    both = slowed(one, generate_s, train_s)
    generating, training = generate_s * both.token_s / one.token_s, train_s * (both.train_s / train_s if train_s else 1)
    # The shorter side shares the machine all the time, the longer one for as long as that.
    assert min(generating, training) == pytest.approx(1.2 * min(generate_s, train_s))
    assert max(generating, training) == pytest.approx(max(generate_s, train_s) + 0.2 * min(generate_s, train_s))
    back = alone(both, generating, training)
    for name in ("token_s", "sequence_s", "train_s"):
        assert getattr(back, name) == pytest.approx(getattr(one, name))


def test_times_that_vary_cost_the_schedule_that_overlaps():
    config = sized(load_config(EXAMPLES / "quickstart.yaml", ["schedule.max_staleness=1"]))
    steady = Speeds(token_s=0.0, sequence_s=0.0002, train_s=384 * 21 * 0.0002, train_token_s=0.0, push_s=0.0)
    scenario = Scenario(lengths=ConstantLength(20), speeds=steady)
    varied = Scenario(lengths=ConstantLength(20), speeds=Speeds(**{**_fields(steady), "jitter": 0.3}))
    even, uneven = predict(config, scenario), predict(config, varied)
    assert even.speedup == pytest.approx(2, rel=0.01), "both sides take as long"
    assert uneven.speedup < 1.85


def _fields(speeds: Speeds) -> dict[str, float]:
    return {name: getattr(speeds, name) for name in speeds.__struct_fields__}


def test_lengths_have_the_mean_of_all_that_was_generated():
    from random import Random

    lengths = MeasuredLengths([2, 4, 30], "x", mean=6.3)
    random = Random(1)
    drawn = [lengths.draw(random) for _ in range(20000)]
    assert sum(drawn) / len(drawn) == pytest.approx(6.3, rel=0.05)


def test_what_cannot_be_estimated_needs_all_speeds(tmp_path):
    keys = ["-s", f"model={{hf: {tmp_path}/nowhere}}"]
    result = CliRunner().invoke(app, ["simulate", "examples/llama8b_async.yaml", *keys])
    assert result.exit_code != 0 and "no speeds can be estimated" in str(result.exception)
    given = ["--lengths", "constant:100", "--token-s", "0.02", "--sequence-s", "0", "--push-s", "1", "--train-s", "3",
             "--train-token-s", "0", "--samples", "600", "--json"]  # fmt: skip
    report = json.loads(output("simulate", "examples/llama8b_async.yaml", *keys, *given))
    assert report["speedup"] > 1 and report["of_steps"] == 390
