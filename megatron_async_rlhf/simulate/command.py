"""`async-rlhf simulate`: from command line to scenario, both schedules, and what is said about them."""

from pathlib import Path
from typing import Any

from msgspec.structs import replace

from megatron_async_rlhf.config.load import load_config
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.simulate.lengths import parse_lengths
from megatron_async_rlhf.simulate.measured import measure
from megatron_async_rlhf.simulate.report import synchronous, to_json
from megatron_async_rlhf.simulate.scenario import Scenario, Speeds
from megatron_async_rlhf.simulate.simulation import simulate


def load_sized(config: Path, overrides: list[str], samples: int | None) -> RunConfig:
    """The configuration, with as many steps as `samples` completions take, whole rollouts."""
    resolved = load_config(config, overrides)
    if samples is None:
        return resolved
    schedule = resolved.schedule
    rollouts = -(-samples // (schedule.groups_per_rollout * resolved.algorithm.samples_per_prompt))
    return load_config(config, [*overrides, f"schedule.steps={rollouts * schedule.updates_per_rollout}"])


def make_scenario(
    config: RunConfig, from_run: Path | None, lengths: str | None, speeds: dict[str, float | None], **rest: Any
) -> Scenario:
    """What was given, else what was measured, else defaults; completions half as long as they may be, on average."""
    measured = measure(from_run) if from_run is not None else None
    drawn = parse_lengths(lengths or f"lognormal:{max(1, config.generator.max_new_tokens / 2):g}:0.6")
    if measured is not None and lengths is None:
        drawn = measured.lengths
    usual = measured.speeds if measured is not None else Speeds()
    given = {name: value for name, value in speeds.items() if value is not None}
    return Scenario(lengths=drawn, speeds=replace(usual, **given), **rest)


def run(config: RunConfig, scenario: Scenario, trace: Path | None) -> dict[str, Any]:
    """Both schedules; the report of `--json`."""
    outcome = simulate(config, scenario, trace)
    return to_json(config, scenario, outcome, simulate(synchronous(config), scenario))
