"""How many reward servers a plan has."""

import json
from pathlib import Path

import pytest

from megatron_async_rlhf.config.load import load_config
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.plan.analytic import Workload
from megatron_async_rlhf.plan.scoring import scoring_s, with_reward_servers
from megatron_async_rlhf.plan.search import _candidates, devices_of, find_plans, step_seconds
from megatron_async_rlhf.simulate.prediction import shape_of

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "examples" / "llama3.1-8b_no_robots" / "rlhf.yaml"
LENGTHS = (150.0, 286.0)


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)


def test_the_time_of_scoring_by_hand():
    """256 completions of 436 tokens, two operations for each of 7.5 billion numbers, at half of 989 TFLOP/s; 2 ms a pass."""
    operations = 256 * 436 * 2 * 7.505e9
    seconds = scoring_s(load_config(RECIPE), "reward", LENGTHS)
    assert seconds == pytest.approx(operations / (0.5 * 989e12) + 256 * 0.002, rel=0.01)
    eight = scoring_s(load_config(RECIPE, ["reward.max_concurrent=8"]), "reward", LENGTHS)
    assert eight == pytest.approx(operations / (0.5 * 989e12) + 32 * 0.002, rel=0.01)
    in_float32 = scoring_s(load_config(RECIPE, ["reward.dtype=float32"]), "reward", LENGTHS)
    assert in_float32 == pytest.approx(operations / (0.5 * 67e12) + 256 * 0.002, rel=0.01)


def test_short_texts_wait_for_the_weights():
    """A pass over one of 20 tokens computes for less time than it reads 15 GB."""
    seconds = scoring_s(load_config(RECIPE), "reward", (10.0, 10.0))
    assert seconds == pytest.approx(256 * (7.505e9 * 2 / (0.6 * 3.35e12) + 0.002), rel=0.01)


def test_a_reward_model_that_fits_no_gpu_is_no_plan(tmp_path):
    large = json.loads((ROOT / "examples/llama8b_reward_model/config.json").read_text())
    large |= {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    (tmp_path / "config.json").write_text(json.dumps(large))
    config = load_config(RECIPE, [f"reward.model={tmp_path}", "launch.nodes=2"])
    with pytest.raises(
        ConfigError, match="no layout that fits is allowed; of the last one: reward: its weights take .* GiB"
    ):
        find_plans(config, shape_of(config), best=1, workload=Workload(lengths=LENGTHS))


@pytest.mark.parametrize(("step_s", "replicas"), [(100.0, 1), (3.0, 2), (1.0, 6), (0.1, 16)])
def test_a_step_never_waits_for_scores_while_there_is_room(step_s, replicas):
    config = load_config(RECIPE, ["launch.nodes=4"])
    assert with_reward_servers(config, LENGTHS, step_s, devices_of(config)).reward_workers == replicas


def test_each_of_several_models_has_its_own():
    models = "[{type: reward_model, model: examples/llama8b_reward_model, name: a, weight: 1.0}, {type: length, per_token: 0.1}]"
    config = with_reward_servers(load_config(RECIPE, [f"reward={models}", "launch.nodes=4"]), LENGTHS, 1.0, 32)
    assert [entry.type for entry in config.rewards] == ["reward_model", "length"]
    assert config.reward_models["reward.0"].replicas > 1


def test_plans_have_the_servers_that_they_need():
    config = load_config(RECIPE, ["launch.nodes=4", "schedule.prompts_per_step=512"])
    plans = find_plans(config, shape_of(config), best=1, workload=Workload(lengths=LENGTHS))
    assert {plan.config.reward_workers for plan in plans} != {1}
    assert all(plan.config.gpus <= 32 for plan in plans)


def test_a_step_is_no_faster_than_its_scores():
    """Sixteen short completions of each prompt, which a reward model reads with the prompt."""
    keys = ["algorithm={type: grpo, samples_per_prompt: 16}", "launch.nodes=1", "schedule.prompts_per_step=32"]
    config = load_config(RECIPE, keys)
    lengths = (350.0, 50.0)
    plans = find_plans(config, shape_of(config), best=1, workload=Workload(lengths=lengths))
    for plan in plans:
        scoring = scoring_s(plan.config, "reward", lengths) / plan.config.reward_workers
        assert step_seconds(plan) >= scoring - 1e-9
    one = Workload(lengths=lengths)
    alone = next(_candidates(config, shape_of(config), one))  # with the one server that the recipe has
    assert alone.scoring > alone.times.train and alone.step_s("one_step") == pytest.approx(alone.scoring)
