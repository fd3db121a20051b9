"""`async-rlhf simulate`: from the command line to a scenario, and both schedules on it."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from msgspec.structs import replace

from megatron_async_rlhf.config.load import load_config
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.simulate.lengths import parse_lengths
from megatron_async_rlhf.simulate.measured import measure
from megatron_async_rlhf.simulate.scenario import Scenario, Speeds


def simulate(
    config: Annotated[Path, typer.Argument(help="YAML configuration; its model and data need not be there.")],
    set: Annotated[list[str], typer.Option("--set", "-s", help="Override one key: section.key=value.")] = [],
    generators: Annotated[int | None, typer.Option(min=1, help="Default: generator.replicas.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Completions in all; default: schedule.steps.")] = None,
    from_run: Annotated[
        Path | None, typer.Option(help="A finished run: lengths and times are as they were there, unless given.")
    ] = None,
    lengths: Annotated[str | None, typer.Option(help="constant:TOKENS or lognormal:MEAN:SIGMA.")] = None,
    token_s: Annotated[float | None, typer.Option(min=0, help="Seconds of a decoding step, whatever is in it.")] = None,
    sequence_s: Annotated[float | None, typer.Option(min=0, help="And for each sequence in it.")] = None,
    train_s: Annotated[float | None, typer.Option(min=0, help="Seconds of an optimizer step.")] = None,
    train_token_s: Annotated[float | None, typer.Option(min=0, help="And for each token in it.")] = None,
    push_s: Annotated[float | None, typer.Option(min=0, help="Seconds the engines are paused for new weights.")] = None,
    crashes_per_hour: Annotated[float, typer.Option(min=0, help="Of each generator.")] = 0.0,
    back_s: Annotated[float, typer.Option(min=0.1, help="Seconds until it is back, on average.")] = 60.0,
    slow: Annotated[int, typer.Option(min=0, help="So many generators are three times as slow.")] = 0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    trace: Annotated[Path | None, typer.Option(help="Write the timeline, for Perfetto.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Run the scheduler on imaginary machines, in virtual time, next to the synchronous schedule.

    All promises of the schedule are checked meanwhile; exit code 1 if one is broken.

    Example: async-rlhf simulate examples/llama8b_async.yaml --samples 20000 --push-s 4
    """
    from rich.console import Console

    from megatron_async_rlhf.simulate.report import show, synchronous, to_json
    from megatron_async_rlhf.simulate.simulation import simulate as simulate_one

    resolved = _load_sized(config, set, samples)
    number = generators or resolved.generator.replicas
    speeds = {
        "token_s": token_s,
        "sequence_s": sequence_s,
        "train_s": train_s,
        "train_token_s": train_token_s,
        "push_s": push_s,
    }
    scenario = _make_scenario(
        resolved,
        from_run,
        lengths,
        speeds,
        generators=number,
        crashes_per_hour=crashes_per_hour,
        back_s=back_s,
        slowness=dict.fromkeys(range(min(slow, number)), 3.0),
        seed=seed,
    )
    outcome = simulate_one(resolved, scenario, trace)
    report = to_json(resolved, scenario, outcome, simulate_one(synchronous(resolved), scenario))
    if json_:
        typer.echo(json.dumps(report, indent=1))
    else:
        show(Console(), report)


def _load_sized(config: Path, overrides: list[str], samples: int | None) -> RunConfig:
    """The configuration, with as many steps as `samples` completions take, whole rollouts."""
    resolved = load_config(config, overrides)
    if samples is None:
        return resolved
    schedule = resolved.schedule
    rollouts = -(-samples // (schedule.groups_per_rollout * resolved.algorithm.samples_per_prompt))
    return load_config(config, [*overrides, f"schedule.steps={rollouts * schedule.updates_per_rollout}"])


def _make_scenario(
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
