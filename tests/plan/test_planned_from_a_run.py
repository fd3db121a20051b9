"""A run whose speeds are known, because it was simulated with them, against what the planner makes of it."""

import json
from pathlib import Path
from random import Random

import pytest
from msgspec.structs import replace

from megatron_async_rlhf.config.load import check_tree, dump_config
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.jobs.inputs import make_model_template
from megatron_async_rlhf.plan.calibration import calibrate
from megatron_async_rlhf.simulate.lengths import MeasuredLengths
from megatron_async_rlhf.simulate.prediction import estimated_scenario, predict, shape_of
from megatron_async_rlhf.simulate.scenario import Scenario, Speeds
from megatron_async_rlhf.simulate.simulation import Simulation
from megatron_async_rlhf.simulate.simulation import simulate as simulate_one
from megatron_async_rlhf.simulate.virtual_time import run_in_virtual_time
from megatron_async_rlhf.telemetry.files import EVALUATIONS, METRICS, POLICY_TEMPLATE_DIR, read_steps
from megatron_async_rlhf.telemetry.recorder import Recorder

SEEN = [4, 5, 6, 30]


def config_with(mode: str, prompts: int, *, share: bool = False) -> RunConfig:
    return check_tree(
        {
            "model": {
                "layers": 2, "hidden_size": 64, "ffn_size": 128, "heads": 2, "kv_heads": 1, "context_length": 96,
            },
            "data": {"train": "builtin"},
            "generator": {"max_new_tokens": 40, "max_concurrent": 256},
            "algorithm": {"type": "online_dpo", "samples_per_prompt": 4},
            "schedule": {"mode": mode, "steps": 12, "prompts_per_step": prompts},
            "learner": {"share_prompts": share},
        }
    )  # fmt: skip


def simulated_run(config: RunConfig, scenario: Scenario, directory: Path) -> None:
    (directory / "config.yaml").write_text(dump_config(config))
    make_model_template(config, directory / POLICY_TEMPLATE_DIR)

    async def whole() -> None:
        simulation = Simulation(config, scenario, directory)
        await simulation.run()
        simulation.recorder.close("completed", None)
        Recorder.write_summary(simulation.recorder, "completed", None)

    run_in_virtual_time(whole())
    sequences = config.schedule.prompts_per_step * config.algorithm.trained_samples
    prompts = scenario.prompt_tokens / (config.algorithm.trained_samples if config.learner.share_prompts else 1)
    length = prompts + sum(SEEN) / len(SEEN)
    steps = read_steps(directory / METRICS)
    trained = {"num_sequences": sequences, "tokens": sequences * length}  # a simulated learner counts none
    (directory / METRICS).write_text("".join(json.dumps(step | trained) + "\n" for step in steps))
    evaluated = [{"token_ids": [0] * length} for length in SEEN]
    (directory / EVALUATIONS).write_text("".join(json.dumps(line) + "\n" for line in evaluated))


@pytest.mark.parametrize(("mode", "prompts"), [("sync", 32), ("async", 32), ("async", 64)])
def test_what_one_run_shows_predicts_another(tmp_path, mode, prompts):
    lengths = MeasuredLengths(SEEN, "a test", sum(SEEN) / len(SEEN))
    calibrated = config_with("sync", 32)
    scenario, _ = estimated_scenario(calibrated, shape_of(calibrated), completions=lengths)
    slow = Speeds(
        token_s=3 * scenario.speeds.token_s,
        sequence_s=3 * scenario.speeds.sequence_s,
        prompt_token_s=scenario.speeds.prompt_token_s,
        train_s=2 * scenario.speeds.train_s,
        train_token_s=2 * scenario.speeds.train_token_s,
        push_s=1.5 * scenario.speeds.push_s,
    )
    machine = replace(scenario, speeds=slow)
    simulated_run(calibrated, machine, tmp_path)
    found = calibrate(tmp_path)
    drawn = [found.completions.draw(Random(seed)) for seed in range(200)]
    assert min(drawn) < sum(SEEN) / len(SEEN) / 2 and max(drawn) > 2 * sum(SEEN) / len(SEEN), "not only their mean"

    config = config_with(mode, prompts)
    expected = simulate_one(config, replace(machine, generators=1)).step_s
    predicted, _ = estimated_scenario(config, shape_of(config), found.lengths, found.factors, found.completions)
    alone = replace(predicted, speeds=replace(predicted.speeds, contention=1.0, jitter=0.0))
    assert predict(config, alone).schedule.step_s == pytest.approx(expected, rel=0.06)


def test_a_prompt_that_is_shared_is_found_as_long_as_it_is(tmp_path):
    lengths, found = MeasuredLengths(SEEN, "a test", sum(SEEN) / len(SEEN)), []
    for share in (False, True):
        config, directory = config_with("sync", 32, share=share), tmp_path / str(share)
        directory.mkdir()
        scenario, speed = estimated_scenario(
            config, shape_of(config), (28.0, sum(SEEN) / len(SEEN)), completions=lengths
        )
        assert scenario.prompt_tokens == pytest.approx(speed.prompt, abs=0.5)
        simulated_run(config, scenario, directory)
        found.append((calibrate(directory), speed.learner.compute))
    (apart, longer), (shared, shorter) = found
    assert shared.lengths == pytest.approx(apart.lengths, rel=0.02)
    prompt, completion = apart.lengths
    assert shared.factors.train == pytest.approx(apart.factors.train, rel=0.1), "nothing is faster than estimated"
    assert shorter == pytest.approx(longer * (prompt / 2 + completion) / (prompt + completion), rel=0.15)
