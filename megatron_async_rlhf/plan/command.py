"""`async-rlhf plan`: from a task and a number of devices to configurations."""

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.options import SetOption

if TYPE_CHECKING:
    from megatron_async_rlhf.plan.search import Plan


def plan(
    config: Annotated[
        Path, typer.Argument(help="YAML configuration of the task; its model and data need not be there.")
    ],
    set: SetOption = [],
    nodes: Annotated[int | None, typer.Option(min=1, help="Machines; default: launch.nodes.")] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=1, help="GPUs of a machine, or cores without GPUs; default: launch.gpus_per_node.")
    ] = None,
    gpu: Annotated[str | None, typer.Option(help="As launch.gpu: a100, h100, h100-pcie, h200, b200.")] = None,
    prompt_tokens: Annotated[
        float | None, typer.Option(min=1, help="Tokens of a prompt, on average; default: half of what it may have.")
    ] = None,
    completion_tokens: Annotated[
        float | None, typer.Option(min=1, help="Tokens of a completion, on average; default: half of what it may have.")
    ] = None,
    from_run: Annotated[
        Path | None, typer.Option(help="A finished run: lengths and speeds are as they were there, unless given.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="First measure this machine, with a run of two minutes or so.")
    ] = False,
    best: Annotated[int, typer.Option(min=1, help="How many plans of each schedule to show.")] = 3,
    out: Annotated[Path | None, typer.Option(help="Write the configuration of the fastest plan to this file.")] = None,
    page: Annotated[Path | None, typer.Option(help="Write the plans as a page (HTML) to this file.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the plans as JSON.")] = False,
) -> None:
    """Divide devices between learner and generators: the layouts that fit, and the time of a step with the best of them.

    Example: async-rlhf plan examples/llama8b_async.yaml --nodes 2 --gpu h200 --out planned.yaml
    """
    from rich.console import Console

    from megatron_async_rlhf.config.load import dump_config, load_config
    from megatron_async_rlhf.formats.hub_snapshot import with_local_models
    from megatron_async_rlhf.plan.report import page as page_of
    from megatron_async_rlhf.plan.report import show, to_json
    from megatron_async_rlhf.plan.search import fastest
    from megatron_async_rlhf.telemetry.files import writing

    overrides = _overrides(set, {"nodes": nodes, "gpus_per_node": gpus_per_node, "gpu": gpu})
    given = load_config(config, overrides, for_plan=True)
    task = with_local_models(given, weights=False)
    if measure and from_run is not None:
        raise ConfigError("--measure and --from-run both say how fast machines are; give one of them")
    plans, assumed = _planned(task, prompt_tokens, completion_tokens, best, from_run=from_run, measure=measure)
    if out is not None:
        with writing(out):
            out.write_text(dump_config(_with_models_of(given, fastest(plans).config)), encoding="utf-8")
    if page is not None:
        with writing(page):
            page.write_text(page_of(plans, assumed), encoding="utf-8")
    if json_:
        typer.echo(json.dumps([to_json(each) for each in plans], indent=1))
        return
    show(Console(highlight=False), plans, assumed)
    if out is not None:
        typer.echo(f"wrote {out}: async-rlhf train {out} --dry-run checks it")
    if page is not None:
        typer.echo(f"wrote {page}")


def _with_models_of(given: RunConfig, planned: RunConfig) -> RunConfig:
    """By the names that the task has for them: where the hub's are on this machine, they are on no other."""
    return planned.model_copy(update={"model": given.model, "algorithm": given.algorithm})


def _overrides(set: list[str], launch: dict[str, Any]) -> list[str]:
    """With what the options say of machines; the memory is that of another GPU than the file's, unless it is given."""
    given = {key: value for key, value in launch.items() if value is not None}
    is_other = "gpu" in given and not any("gpu_memory_gib" in override for override in set)
    return [
        *set,
        *(f"launch.{key}={value}" for key, value in given.items()),
        *(["launch.gpu_memory_gib=null"] if is_other else []),
    ]


def _planned(
    task: RunConfig,
    prompt_tokens: float | None,
    completion_tokens: float | None,
    best: int,
    *,
    from_run: Path | None,
    measure: bool,
) -> "tuple[list[Plan], str]":
    """The plans, and what they assume."""
    from megatron_async_rlhf.estimate.machines import machine_of
    from megatron_async_rlhf.estimate.speed import Factors, typical_lengths
    from megatron_async_rlhf.plan.analytic import Workload
    from megatron_async_rlhf.plan.calibration import calibrate
    from megatron_async_rlhf.plan.measuring import measure_here
    from megatron_async_rlhf.plan.search import find_plans
    from megatron_async_rlhf.simulate.prediction import shape_of

    arch = shape_of(task)
    calibration = calibrate(from_run) if from_run is not None else None
    usual = calibration.lengths if calibration is not None else typical_lengths(task, arch)
    completions = calibration.completions if calibration is not None and completion_tokens is None else None
    if measure:  # its completions are another task's
        with tempfile.TemporaryDirectory() as directory:
            calibration = calibrate(
                measure_here(task, arch, Path(directory), note=lambda line: typer.echo(line, err=True)),
                "on this machine",
            )
    lengths = prompt_tokens or usual[0], completion_tokens or usual[1]
    factors = calibration.factors if calibration is not None else Factors()
    plans = find_plans(
        task, arch, best=best, workload=Workload(lengths=lengths, completions=completions, factors=factors)
    )
    assumed = (
        f"prompts of {lengths[0]:.0f} and completions of {lengths[1]:.0f} tokens on average, {machine_of(task).assumed}"
    )
    return plans, assumed if calibration is None else f"{assumed}; {calibration.source}"
