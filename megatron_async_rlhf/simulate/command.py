"""`async-rlhf simulate`: from the command line to a scenario, and both schedules on it."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from msgspec.structs import replace

from megatron_async_rlhf.config.load import load_config
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.formats.hub_snapshot import with_local_models
from megatron_async_rlhf.options import SetOption
from megatron_async_rlhf.simulate.lengths import parse_lengths
from megatron_async_rlhf.simulate.scenario import Scenario


def _seconds(help: str) -> Any:
    """An option that takes the place of an estimated time."""
    return typer.Option(min=0, help=help)


def simulate(
    config: Annotated[Path, typer.Argument(help="YAML configuration; its model and data need not be there.")],
    set: SetOption = [],
    generators: Annotated[
        int | None, typer.Option(min=1, help="How many generators; default: generator.replicas.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Completions in all; default: those of the first rollouts.")
    ] = None,
    from_run: Annotated[
        Path | None, typer.Option(help="A finished run: lengths and times are as they were there, unless given.")
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(help="Tokens of a completion: constant:TOKENS or lognormal:MEAN:SIGMA.")
    ] = None,
    token_s: Annotated[float | None, _seconds("Seconds of a decoding step, whatever is in it.")] = None,
    sequence_s: Annotated[float | None, _seconds("Extra seconds per sequence in a decoding step.")] = None,
    train_s: Annotated[float | None, _seconds("Seconds of an optimizer step.")] = None,
    train_token_s: Annotated[float | None, _seconds("Extra seconds per token in an optimizer step.")] = None,
    push_s: Annotated[float | None, _seconds("Seconds the engines are paused for new weights.")] = None,
    crashes_per_hour: Annotated[float, typer.Option(min=0, help="Expected crashes per generator per hour.")] = 0.0,
    back_s: Annotated[
        float, typer.Option(min=0.1, help="Seconds until a crashed generator is back, on average.")
    ] = 60.0,
    slow: Annotated[int, typer.Option(min=0, help="How many generators are three times as slow as the others.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of lengths, crashes and jitter.")] = 0,
    trace: Annotated[Path | None, typer.Option(help="Write the timeline to this file, for Perfetto.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Run the scheduler on imaginary machines, in virtual time, next to the synchronous schedule.

    Times and lengths that are not given are those a dry run estimates, and so is the verdict.

    All promises of the schedule are checked meanwhile; exit code 1 if one is broken.

    Example: async-rlhf simulate examples/llama8b_async.yaml --samples 20000 --push-s 4
    """
    from rich.console import Console

    from megatron_async_rlhf.simulate.report import show

    whole = with_local_models(load_config(config, set), weights=False)
    report = _simulated(
        whole,
        _sized(config, set, whole, samples),
        from_run,
        lengths,
        dict(token_s=token_s, sequence_s=sequence_s, train_s=train_s, train_token_s=train_token_s, push_s=push_s),
        trace,
        generators=generators or whole.generator.replicas,
        crashes_per_hour=crashes_per_hour,
        back_s=back_s,
        slow=slow,
        seed=seed,
    )
    if json_:
        typer.echo(json.dumps(report, indent=1))
    else:
        show(Console(), report)


def _sized(file: Path, overrides: list[str], config: RunConfig, samples: int | None) -> RunConfig:
    """The configuration, with as many steps as `samples` completions take, whole rollouts."""
    from megatron_async_rlhf.simulate.prediction import first_steps

    schedule = config.schedule
    steps = first_steps(config)
    if samples is not None:
        rollouts = -(-samples // config.completions_per_rollout)
        steps = rollouts * schedule.updates_per_rollout
    return with_local_models(load_config(file, [*overrides, f"schedule.steps={steps}"]), weights=False)


def _simulated(
    whole: RunConfig,
    sized: RunConfig,
    from_run: Path | None,
    lengths: str | None,
    speeds: dict[str, float | None],
    trace: Path | None,
    *,
    generators: int,
    slow: int,
    **rest: Any,
) -> dict[str, Any]:
    """The report on `sized`, the simulated part of the `whole` run; what is None is as usual."""
    from megatron_async_rlhf.simulate.measured import measure
    from megatron_async_rlhf.simulate.prediction import known_error, predict
    from megatron_async_rlhf.simulate.report import to_json

    measured = measure(from_run) if from_run is not None else None
    if measured is not None:
        usual = Scenario(lengths=measured.lengths, speeds=measured.speeds)
    else:
        usual = _estimated(whole, needed=None in (lengths, *speeds.values()))
    scenario = replace(
        usual,
        generators=generators,
        lengths=usual.lengths if lengths is None else parse_lengths(lengths),
        speeds=replace(usual.speeds, **{name: value for name, value in speeds.items() if value is not None}),
        slowness=dict.fromkeys(range(min(slow, generators)), 3.0),
        **rest,
    )
    prediction = predict(sized, scenario, trace)
    error = known_error(whole) if measured is None else measured.known_error(usual)
    return to_json(sized, whole.schedule.steps, prediction, error)


def _estimated(config: RunConfig, *, needed: bool) -> Scenario:
    """
    Args:
        needed: something is not given.

    Raises:
        ConfigError: there is nothing to estimate from.
    """
    from megatron_async_rlhf.simulate.prediction import estimated_scenario, shape_of

    if not needed:
        return Scenario()
    try:
        return estimated_scenario(config, shape_of(config))[0]
    except ConfigError as error:
        raise ConfigError(
            f"no speeds can be estimated ({error}); give the run's times: --lengths, --token-s, --sequence-s, --train-s, "
            "--train-token-s and --push-s, or --from-run"
        ) from None
