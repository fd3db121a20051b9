"""`async-rlhf simulate`, and what it reads out of a finished run."""

import asyncio
import json
from pathlib import Path
from random import Random

import pytest
from random_schedules import make_config
from typer.testing import CliRunner

from megatron_async_rlhf.cli import app
from megatron_async_rlhf.config.load import dump_config
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.estimate.machines import CPU_CORE
from megatron_async_rlhf.simulate.lengths import ConstantLength, parse_lengths
from megatron_async_rlhf.simulate.measured import measure
from megatron_async_rlhf.simulate.prediction import slowed, synchronous
from megatron_async_rlhf.simulate.scenario import Scenario, Speeds
from megatron_async_rlhf.simulate.simulation import Simulation
from megatron_async_rlhf.simulate.simulation import simulate as simulate_one
from megatron_async_rlhf.simulate.virtual_time import run_in_virtual_time
from megatron_async_rlhf.telemetry.recorder import Recorder

EXAMPLE = str(Path(__file__).parents[2] / "examples/llama8b_async.yaml")


def simulate(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["simulate", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_the_report_compares_with_the_synchronous_schedule(tmp_path):
    speeds = ["--lengths", "constant:100", "--token-s", "0.05", "--sequence-s", "0", "--push-s", "0"]
    train = ["--train-s", "5.05", "--train-token-s", "0", "--trace", str(tmp_path / "trace.json")]
    report = json.loads(simulate(EXAMPLE, "--samples", "5000", "--generators", "2", *speeds, *train, "--json"))
    assert (report["steps"], report["generators"]) == (20, 2), "256 completions a step"
    # A batch is 100 decoding steps and one for the prompts: as long as a training step, so both overlap entirely.
    assert report["synchronous"]["wall_seconds"] == pytest.approx(20 * 10.1, rel=0.01)
    assert report["schedule"]["wall_seconds"] == pytest.approx(21 * 5.05, rel=0.01)
    assert report["speedup"] == pytest.approx(2, rel=0.01), "without the first rollout, on which nothing can overlap"
    assert report["schedule"]["staleness"]["histogram"] == {"0": 25600, "1": 19 * 25600}
    assert report["schedule"]["samples"] == 20 * 256
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert sum(event["name"].startswith("step") for event in events) == 20


def test_crashes_and_slow_generators_cost_time():
    keys = ["-s", "schedule.generation=streaming", "--samples", "3000", "--json", "--seed", "3"]
    whole = json.loads(simulate(EXAMPLE, *keys))["schedule"]
    broken = json.loads(simulate(EXAMPLE, *keys, "--crashes-per-hour", "20", "--slow", "1"))["schedule"]
    assert broken["samples_cancelled"] > 0 == whole["samples_cancelled"]
    assert broken["wall_seconds"] > whole["wall_seconds"]


def test_the_table_names_both_sides():
    output = simulate(EXAMPLE, "--samples", "512")
    assert "synchronous" in output and "overlap efficiency" in output and "times as fast" in output


def test_a_finished_run_gives_back_what_it_was_made_of(tmp_path):
    speeds = Speeds(
        token_s=0.0,
        sequence_s=0.003,
        train_s=0.7,
        train_token_s=0.0,
        push_s=0.25,
        contention=1.0 + CPU_CORE.host_contention,
    )
    config = make_config({"steps": 8, "prompts_per_step": 8}, generator={"max_new_tokens": 64})
    (tmp_path / "config.yaml").write_text(dump_config(config))
    turns = simulate_one(synchronous(config), Scenario(lengths=ConstantLength(20), speeds=speeds)).totals
    both = slowed(speeds, turns.generate_busy_s, turns.train_busy_s)
    assert both.train_s > speeds.train_s and both.sequence_s > speeds.sequence_s

    async def whole() -> None:
        scenario = Scenario(lengths=ConstantLength(20), speeds=both)
        simulation = Simulation(config, scenario, tmp_path)
        await simulation.run()
        simulation.recorder.close("completed", None)
        Recorder.write_summary(simulation.recorder, "completed", None)

    run_in_virtual_time(whole())
    found = measure(tmp_path)
    assert found.speeds.jitter == pytest.approx(0, abs=0.01)
    error = found.known_error(Scenario(lengths=found.lengths, speeds=found.speeds))
    assert "(0% too " in error and "measured were" in error
    assert found.speeds.train_s == pytest.approx(0.7, rel=1e-3)
    assert found.speeds.push_s == pytest.approx(0.25, rel=1e-3)
    assert found.speeds.sequence_s == pytest.approx(0.003, rel=0.01)  # queueing a batch is in the measured time
    assert found.lengths.draw(None) == 20
    line = '{"prompt": "a\u2028b\x85c", "token_ids": [1, 2, 3]}\n'  # no line ends there
    (tmp_path / "evaluations.jsonl").write_text(line, encoding="utf-8")
    scaled = measure(tmp_path).lengths
    assert scaled.name.startswith("1 measured in the evaluations") and "20.0 tokens on average" in scaled.name
    assert scaled.draw(Random(0)) == 20, "as long as what the run generated"


def test_a_resumed_run_counts_all_its_starts(tmp_path):
    speeds = Speeds(token_s=0.0, sequence_s=0.003, train_s=0.7, train_token_s=0.0, push_s=0.25)
    config = make_config({"mode": "sync", "steps": 8, "prompts_per_step": 8}, generator={"max_new_tokens": 64})
    (tmp_path / "config.yaml").write_text(dump_config(config))
    scenario = Scenario(lengths=ConstantLength(20), speeds=speeds)

    async def start(until: int, **before) -> Simulation:
        simulation = Simulation(config, scenario, tmp_path, **before)

        async def stop() -> None:
            while simulation.learner.version < until:
                await asyncio.sleep(0.1)
            await simulation.controller.stop()

        stopping = asyncio.create_task(stop())
        await simulation.run()
        await stopping
        simulation.recorder.close("completed", None)
        Recorder.write_summary(simulation.recorder, "completed", None)
        return simulation

    first = run_in_virtual_time(start(until=6))
    before = {"ledger": first.ledger, "state": first.controller.state, "totals": first.recorder.totals}
    run_in_virtual_time(start(until=8, **before))
    found = measure(tmp_path)
    assert found.speeds.train_s == pytest.approx(0.7, rel=1e-3)
    assert found.speeds.push_s == pytest.approx(0.25, rel=1e-3)


def test_what_cannot_be_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="--from-run .*: has no finished RL steps"):
        measure(tmp_path)
    (tmp_path / "summary.json").write_text('{"status": "completed", "steps": "ten"}', encoding="utf-8")
    with pytest.raises(
        ConfigError, match="--from-run .*: has no finished RL steps .summary.json: .*; give the directory"
    ):
        measure(tmp_path)
    for text in ("lognormal:0:1", "constant", "normal:3:1", "constant:x"):
        with pytest.raises(ConfigError, match=f"--lengths {text}: must be constant:TOKENS or lognormal:MEAN:SIGMA"):
            parse_lengths(text)
