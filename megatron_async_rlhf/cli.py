"""The `async-rlhf` command."""

import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_async_rlhf.config.advice import advice
from megatron_async_rlhf.config.load import load_config
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.converter.command import compare_holders, export_hf, import_hf, verify_weights
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.generator.places import places_problem, threads_problem
from megatron_async_rlhf.installed import check_installed
from megatron_async_rlhf.interpreter import check_working_directory, print_anything, use_utf8
from megatron_async_rlhf.launch.command import launch
from megatron_async_rlhf.launch.surroundings import check_surroundings
from megatron_async_rlhf.launch.terminal import outlive_readers
from megatron_async_rlhf.limits import raise_soft_limits
from megatron_async_rlhf.simulate.command import simulate
from megatron_async_rlhf.sweep.command import sweep
from megatron_async_rlhf.telemetry.files import (
    EXPORT_DIR,
    INPUTS,
    METRICS,
    POLICY_TEMPLATE_DIR,
    RESOLVED_CONFIG,
    ROLLOUT_DIR,
    read_lines,
)
from megatron_async_rlhf.usage import run_command_line

if TYPE_CHECKING:
    from megatron_async_rlhf.jobs.inputs import Materials
    from megatron_async_rlhf.launch.fleet import Fleet
    from megatron_async_rlhf.launch.plan import ProcessPlan
    from megatron_async_rlhf.launch.resume import Resumption

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

ConfigArgument = Annotated[
    Path,
    typer.Argument(help="YAML configuration, such as examples/quickstart.yaml; to resume, also a run's directory."),
]
SetOption = Annotated[list[str], typer.Option("--set", "-s", help="Override one key: section.key=value. Repeatable.")]
NodeRankOption = Annotated[
    int,
    typer.Option(
        envvar="SLURM_NODEID", min=0, help="Which of launch.nodes machines this is; the first one supervises."
    ),
]


@app.callback()
def _root() -> None:
    """Asynchronous RLHF: Megatron-core learns while vLLM generates."""
    check_working_directory()


@app.command()
def doctor(
    config: Annotated[
        Path | None, typer.Argument(help="Also say what of this configuration the machine cannot do.")
    ] = None,
    set: SetOption = [],
) -> None:
    """Show what this machine can run, and how to get what is missing; exit code 1 if a run cannot work.

    Example: async-rlhf doctor examples/quickstart.yaml
    """
    from megatron_async_rlhf.doctor import examine, problems

    cannot: list[str] = []
    resolved = None
    if config is not None:  # what is wrong with it is said at the end: the machine can be looked at all the same
        try:
            resolved = load_config(config, set)
        except ConfigError as error:
            cannot = str(error).splitlines()
    broken = False
    for finding in examine():
        advice = f"  ({finding.advice})" if finding.advice and finding.state != "ok" else ""
        typer.echo(f"{finding.state:8}{finding.what}: {finding.detail}{advice}")
        broken |= finding.state == "broken"
    if resolved is not None:
        cannot += filter(None, [places_problem(resolved), threads_problem(resolved)])
        cannot += problems(resolved) if not broken else []
    for problem in cannot:
        typer.echo(f"{'cannot':8}{problem}")
    raise typer.Exit(int(broken or bool(cannot)))


@app.command()
def train(
    config: ConfigArgument,
    set: SetOption = [],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print plan and estimate, start nothing.")
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on from the last checkpoint in run.dir; from the beginning if there is none."
        ),
    ] = False,
    node_rank: NodeRankOption = 0,
) -> None:
    """Run the whole RLHF job, on this machine or, started once on each, on launch.nodes of them.

    Example: async-rlhf train examples/quickstart.yaml -s schedule.mode=sync -s run.name=sync
    """
    from megatron_async_rlhf.estimate.fitting import gpu_budget
    from megatron_async_rlhf.jobs.inputs import make_model_template
    from megatron_async_rlhf.launch.fleet import gather
    from megatron_async_rlhf.launch.inputs import check_resumed_inputs, write_inputs
    from megatron_async_rlhf.launch.owner import owning
    from megatron_async_rlhf.launch.plan import plan_processes
    from megatron_async_rlhf.launch.resume import load_for_run
    from megatron_async_rlhf.launch.run_directory import check_writable, reopen_run_directory

    resolved = load_for_run(config, set, resume)
    if not dry_run:
        check_installed("torch", "megatron", "vllm")
        _warn(check_surroundings(places_problem(resolved), threads_problem(resolved)))
        _serve_unless_first(resolved, node_rank)
    _warn(advice(resolved))
    check_writable(resolved)
    if dry_run:
        return _plan_only(resolved, resume)
    with (
        gather(resolved) as fleet,
        owning(resolved),
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch,
    ):
        start = _find_start(resolved, resume)
        if start.finished:
            return
        run_dir, version = resolved.run.path.absolute(), start.version
        template = Path(scratch) / "model" if version is None else run_dir / POLICY_TEMPLATE_DIR
        if version is None:
            make_model_template(resolved, template)
        materials = _check_all(resolved, template)
        inputs, warnings = check_resumed_inputs(resolved, materials, is_new=version is None)
        _warn(warnings)
        budget, context = gpu_budget(resolved, materials.architecture), materials.architecture.context_length
        plan = plan_processes(resolved, run_dir, context, fleet.nodes, version, budget=budget)
        if version is None:
            run_dir = _new_run_directory(resolved, template)
        else:
            reopen_run_directory(resolved, version)
        if not (run_dir / INPUTS).is_file():  # of a resumed run what it was started with counts
            write_inputs(run_dir, inputs)
        raise typer.Exit(_supervise(resolved, plan, run_dir, fleet))


app.command()(simulate)
app.command()(launch)


@app.command()
def sft(
    config: ConfigArgument,
    set: SetOption = [],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan, start nothing.")
    ] = False,
    node_rank: NodeRankOption = 0,
) -> None:
    """Run the warm start alone, `warm_start` and `data` of a configuration, and export the policy.

    RL runs then start from it with model.hf=<run>/checkpoints/final and warm_start.steps=0.

    Example: async-rlhf sft examples/quickstart.yaml -s run.name=sft
    """
    from megatron_async_rlhf.jobs.inputs import check_inputs, make_model_template
    from megatron_async_rlhf.launch.dry_run import print_sft_plan
    from megatron_async_rlhf.launch.fleet import gather
    from megatron_async_rlhf.launch.owner import owning
    from megatron_async_rlhf.launch.plan import plan_learner_alone
    from megatron_async_rlhf.launch.resume import load_for_run
    from megatron_async_rlhf.launch.run_directory import check_inputs_apart, check_writable

    resolved = load_for_run(config, set, resume=False)
    if not resolved.warm_start.steps:
        raise ConfigError("warm_start.steps = 0: sft makes the steps of the warm start; set at least 1")
    if not dry_run:
        check_installed("torch", "megatron")
        _warn(check_surroundings())
        _serve_unless_first(resolved, node_rank)
    check_writable(resolved)
    if dry_run:
        check_inputs_apart(resolved)
        print_sft_plan(resolved)
        return
    with (
        gather(resolved) as fleet,
        owning(resolved),
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch,
    ):
        check_inputs_apart(resolved)
        template = Path(scratch) / "model"
        make_model_template(resolved, template)
        check_inputs(resolved, template)
        plan = plan_learner_alone(resolved, resolved.run.path.absolute(), fleet.nodes, "sft")
        run_dir = _new_run_directory(resolved, template)
        raise typer.Exit(_supervise(resolved, plan, run_dir, fleet))


@app.command()
def replay(
    run: Annotated[Path, typer.Argument(help="A run with schedule.record = true.")],
    out: Annotated[Path | None, typer.Option(help="Directory of the new run; default: <run>.replay beside it.")] = None,
    node_rank: NodeRankOption = 0,
) -> None:
    """Train again on what a run has recorded, without generators, and prove that the same bits come out.

    Losses and gradient norms are compared at every step, the weights at the end.

    Example: async-rlhf replay runs/quickstart
    """
    from megatron_async_rlhf.converter.sources import open_holders
    from megatron_async_rlhf.launch.fleet import gather
    from megatron_async_rlhf.launch.inputs import check_resumed_inputs
    from megatron_async_rlhf.launch.owner import owning
    from megatron_async_rlhf.launch.plan import plan_learner_alone
    from megatron_async_rlhf.launch.run_directory import check_inputs_apart, check_writable
    from megatron_async_rlhf.scheduler.recording import RolloutLog

    run = run.absolute()
    if not (run / RESOLVED_CONFIG).is_file():
        raise ConfigError(f"{run} is no run: it has no {RESOLVED_CONFIG}")
    earlier = load_config(run / RESOLVED_CONFIG)
    section = earlier.run.model_copy(update={"dir": out or run.with_name(f"{run.name}.replay")})
    config = earlier.model_copy(update={"run": section})
    _warn(check_surroundings())
    _serve_unless_first(config, node_rank)
    check_writable(config)
    with gather(config) as fleet, owning(config):
        check_inputs_apart(config)
        if run.resolve().is_relative_to(config.run.path.resolve()):
            raise ConfigError(f"--out {out} would take the place of {run} itself; choose another")
        recorded = sum(1 for _ in RolloutLog(run / ROLLOUT_DIR).read(end=len(read_lines(run / METRICS))))
        if not recorded:
            raise ConfigError(f"{run} has recorded nothing; it must be run with schedule.record = true")
        _warn(check_resumed_inputs(earlier, run_dir=run, starts_over=True)[1])
        run_dir = config.run.path.absolute()
        plan = plan_learner_alone(config, run_dir, fleet.nodes, "replay", ["--recorded", str(run)])
        _new_run_directory(config, run / POLICY_TEMPLATE_DIR)
        if code := _supervise(config, plan, run_dir, fleet):
            raise typer.Exit(code)
    if recorded < earlier.schedule.rollouts or not (run / EXPORT_DIR).is_dir():
        typer.echo(
            f"{recorded} rollouts came out the same; {run} was not completed, so there are no weights to compare"
        )
        return
    compare_holders(*open_holders(str(run), str(run_dir), None), None)


app.command()(sweep)
app.command()(import_hf)
app.command()(export_hf)
app.command()(verify_weights)


def _serve_unless_first(config: RunConfig, node_rank: int) -> None:
    """On every machine but the first: do as that one says, then exit."""
    from megatron_async_rlhf.launch.agent import serve
    from megatron_async_rlhf.launch.nodes import check_node_rank

    check_node_rank(config, node_rank)
    if node_rank:
        outlive_readers()
        raise typer.Exit(serve(config, node_rank))


def _plan_only(config: RunConfig, resume: bool) -> None:
    """Of a dry run; what a resumed run reads is compared too."""
    from megatron_async_rlhf.launch.dry_run import print_plan
    from megatron_async_rlhf.launch.inputs import check_resumed_inputs

    start = _find_start(config, resume)
    if start.version is not None:
        _warn(check_resumed_inputs(config)[1])
    if not start.finished:
        print_plan(config)


def _find_start(config: RunConfig, resume: bool) -> "Resumption":
    """What a run goes on from, told to the user; a new one must not take the place of what it reads."""
    from megatron_async_rlhf.launch.resume import Resumption, find_resumption
    from megatron_async_rlhf.launch.run_directory import check_inputs_apart

    start = find_resumption(config) if resume else Resumption()
    if start.note:
        typer.echo(start.note)
    if start.version is None and not start.finished:
        check_inputs_apart(config)
    return start


def _check_all(config: RunConfig, template: Path) -> "Materials":
    """Model, data, weights and memory of a whole run, before anything of it is there."""
    from megatron_async_rlhf.estimate.report import refuse_too_large
    from megatron_async_rlhf.jobs.inputs import check_inputs, doubts

    materials = check_inputs(config, template)
    refuse_too_large(config, materials.architecture)
    _warn(doubts(config, materials))
    return materials


def _supervise(config: RunConfig, plan: "ProcessPlan", run_dir: Path, fleet: "Fleet") -> int:
    from megatron_async_rlhf.launch.display import Display
    from megatron_async_rlhf.launch.supervisor import Supervisor

    outlive_readers()
    return Supervisor(config, plan, run_dir, Display(), fleet).run()


def _new_run_directory(config: RunConfig, template: Path) -> Path:
    """Made; says where an earlier run went."""
    from megatron_async_rlhf.launch.run_directory import create_run_directory

    run_dir, aside = create_run_directory(config, template)
    if aside is not None:
        typer.echo(f"an earlier run is now in {aside}")
    return run_dir


def _warn(lines: Iterable[str]) -> None:
    for line in lines:
        typer.echo(f"warning: {line}", err=True)


def main() -> None:
    """Entry point; errors the user can mend are one line each on stderr, exit code 2 before anything started."""
    use_utf8()
    print_anything()
    raise_soft_limits()
    raise SystemExit(run_command_line(app, sys.argv[1:]))


if __name__ == "__main__":
    main()
