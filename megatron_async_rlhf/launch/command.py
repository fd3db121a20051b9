"""`async-rlhf train`, `sft` and `replay`: from the command line to what is started; `launch.start` does that."""

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_async_rlhf.config.load import load_config
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.config.warnings import config_warnings
from megatron_async_rlhf.converter.command import compare_holders
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.generator.places import places_problem, threads_problem
from megatron_async_rlhf.installed import check_installed
from megatron_async_rlhf.options import (
    ConfigArgument,
    DryRunOption,
    NodeRankOption,
    ResumeOption,
    SetOption,
    note,
    warn,
)
from megatron_async_rlhf.telemetry.files import (
    EXPORT_DIR,
    FAILED_ROLLOUT,
    METRICS,
    POLICY_TEMPLATE_DIR,
    RESOLVED_CONFIG,
    ROLLOUT_DIR,
    check_is_run,
    read_lines,
)
from megatron_async_rlhf.telemetry.summary import is_completed

if TYPE_CHECKING:
    from megatron_async_rlhf.launch.display import Display
    from megatron_async_rlhf.launch.dry_run import Plan
    from megatron_async_rlhf.launch.fleet import Fleet
    from megatron_async_rlhf.launch.resume import Resumption
    from megatron_async_rlhf.launch.start import Start


def train(
    config: ConfigArgument,
    set: SetOption = [],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print plan and estimate, start nothing.")
    ] = False,
    resume: ResumeOption = False,
    node_rank: NodeRankOption = 0,
) -> None:
    """Run the whole RLHF job, on this machine or, started once on each, on launch.nodes of them.

    Example: async-rlhf train examples/quickstart.yaml -s schedule.mode=sync -s run.name=sync
    """
    from megatron_async_rlhf.launch.dry_run import echo_plan
    from megatron_async_rlhf.launch.resume import load_for_run
    from megatron_async_rlhf.launch.run_directory import check_writable

    resolved = load_for_run(config, set, resume, weights=not dry_run)
    if dry_run:
        warn(config_warnings(resolved))
        check_writable(resolved)
        if (plan := plan_of_training(resolved, resume)) is not None:
            echo_plan(resolved, plan)
        return
    raise typer.Exit(run_training(resolved, resume=resume, node_rank=node_rank))


def run_training(
    config: RunConfig, *, resume: bool, node_rank: int = 0, display: "Callable[[], Display] | None" = None
) -> int:
    """The whole job; the exit code.

    Args:
        display: makes what shows the run; default: on the terminal.

    Raises:
        ConfigError, DataError, CheckpointError: one line; nothing was started.
    """
    from megatron_async_rlhf.launch.start import prepare_machine, run

    check_installed("torch", "megatron", "vllm")
    prepare_machine(config, node_rank, places_problem(config), threads_problem(config))
    warn(config_warnings(config))
    return run(config, lambda fleet, scratch: _decide_training(config, resume, fleet, scratch), display)


def sft(
    config: ConfigArgument,
    set: SetOption = [],
    dry_run: DryRunOption = False,
    resume: ResumeOption = False,
    node_rank: NodeRankOption = 0,
) -> None:
    """Fine-tune the policy on the answers in `data`, as the section `sft` says, and export it.

    Without that section the warm start of a run is made, alone. RL runs then start from the policy with
    model.hf=<run>/checkpoints/final and warm_start.steps=0.

    Example: async-rlhf sft examples/quickstart.yaml -s run.name=sft
    """
    from megatron_async_rlhf.launch.dry_run import echo_plan, plan_of_sft
    from megatron_async_rlhf.launch.resume import load_for_run
    from megatron_async_rlhf.launch.run_directory import check_inputs_apart, check_writable
    from megatron_async_rlhf.launch.start import prepare_machine, run

    resolved = load_for_run(config, set, resume, weights=not dry_run)
    check_sft_section(resolved)
    if dry_run:
        check_writable(resolved)
        check_inputs_apart(resolved)
        return echo_plan(resolved, plan_of_sft(resolved))
    check_installed("torch", "megatron")
    prepare_machine(resolved, node_rank)

    raise typer.Exit(run(resolved, lambda fleet, scratch: _decide_sft(resolved, resume, fleet, scratch)))


def replay(
    run: Annotated[Path, typer.Argument(help="A run with schedule.record = true; with --failed any.")],
    failed: Annotated[
        bool,
        typer.Option("--failed", help="Train only on the rollout whose loss was not finite, from the state before it."),
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Directory of the new run; default: <run>.replay beside it.")] = None,
    node_rank: NodeRankOption = 0,
) -> None:
    """Train again on what a run has recorded, without generators, and prove that the same bits come out.

    Losses and gradient norms are compared at every step, the weights at the end. A run that ended because a loss was not
    finite has kept that rollout and the state before it: with --failed it is trained on alone, and must fail again.

    Example: async-rlhf replay runs/quickstart
    """
    from megatron_async_rlhf.converter.sources import open_holders
    from megatron_async_rlhf.launch import start
    from megatron_async_rlhf.launch.input_digests import check_resumed_inputs
    from megatron_async_rlhf.launch.plan import plan_learner_alone
    from megatron_async_rlhf.launch.run_directory import check_inputs_apart

    check_is_run(run)
    recorded = run.absolute()
    earlier = load_config(recorded / RESOLVED_CONFIG)
    section = earlier.run.model_copy(update={"dir": out or recorded.with_name(f"{recorded.name}.replay")})
    config = earlier.model_copy(update={"run": section})
    start.prepare_machine(config, node_rank)
    rollouts = 0

    def decide(fleet: "Fleet", _: Path) -> start.Start:
        nonlocal rollouts
        check_inputs_apart(config)
        if recorded.resolve().is_relative_to(config.run.path.resolve()):
            raise ConfigError(f"--out {out} would take the place of {recorded} itself; choose another")
        rollouts = _check_failed(recorded) if failed else _check_recorded(recorded)
        warn(check_resumed_inputs(earlier, run_dir=recorded, starts_over=not failed)[1])
        arguments = ["--recorded", str(recorded), *(["--failed"] if failed else [])]
        plan = plan_learner_alone(config, config.run.path.absolute(), fleet.nodes, "replay", arguments)
        return start.Start(plan=plan, template=recorded / POLICY_TEMPLATE_DIR)

    if (code := start.run(config, decide)) or failed:
        raise typer.Exit(code)
    if rollouts < earlier.schedule.rollouts or not (recorded / EXPORT_DIR).is_dir():
        typer.echo(
            f"{rollouts} rollouts came out the same; {recorded} was not completed, so there are no weights to compare"
        )
        return
    compare_holders(*open_holders(str(recorded), str(config.run.path.absolute()), None), None)


def _check_recorded(recorded: Path) -> int:
    """How many rollouts a run has recorded.

    Raises:
        ConfigError: none.
    """
    from megatron_async_rlhf.scheduler.recording import RolloutLog

    rollouts = sum(1 for _ in RolloutLog(recorded / ROLLOUT_DIR).read(end=len(read_lines(recorded / METRICS))))
    if not rollouts:
        raise ConfigError(f"{recorded} has recorded nothing; it must be run with schedule.record = true")
    return rollouts


def _check_failed(recorded: Path) -> int:
    """One: that whose loss was not finite.

    Raises:
        ConfigError: there is none, or the state before it was not kept.
        CheckpointError: either cannot be read.
    """
    from megatron_async_rlhf.checkpoint.run_checkpoints import RunCheckpoints
    from megatron_async_rlhf.formats.file_digests import check_digests
    from megatron_async_rlhf.scheduler.recording import RecordedRollout

    path = recorded / FAILED_ROLLOUT
    if not path.is_file():
        raise ConfigError(
            f"{path} is not there: no loss of the run was not finite, or its rollouts have several optimizer steps, the "
            "first of which changes the state; with schedule.record = true, `async-rlhf replay` trains on all of them again"
        )
    version = RecordedRollout.read(path).command.version
    checkpoints = RunCheckpoints(recorded)
    if version not in checkpoints.versions():
        raise ConfigError(
            f"{checkpoints.path(version)} is not there: the state before the rollout was not kept, or deleted"
        )
    check_digests(checkpoints.path(version))
    return 1


def check_sft_section(config: RunConfig) -> None:
    """
    Raises:
        ConfigError: `sft` has nothing to do.
    """
    if config.sft is None and not config.warm_start.steps:
        raise ConfigError(
            "sft: the configuration has no section of that name, and without one the steps of the warm start are made, of "
            "which warm_start.steps = 0 has none; add `sft: {epochs: 1}`, or set warm_start.steps"
        )


def plan_of_training(config: RunConfig, resume: bool, coming: Mapping[Path, str] | None = None) -> "Plan | None":
    """What a dry run says of `train`, and None of a run that is completed; what a resumed run reads is compared too.

    Args:
        coming: as for `missing_inputs`.

    Raises:
        ConfigError, DataError, CheckpointError: one line.
    """
    from megatron_async_rlhf.launch.dry_run import plan_of_run
    from megatron_async_rlhf.launch.input_digests import check_resumed_inputs

    found = _find_resumption(config, resume)
    if found.version is not None:
        warn(check_resumed_inputs(config)[1])
    return None if found.finished else plan_of_run(config, coming)


def _decide_training(config: RunConfig, resume: bool, fleet: "Fleet", scratch: Path) -> "Start | None":
    """All that can be checked of a run is, before anything of it is there."""
    from megatron_async_rlhf.estimate.fitting import generator_budget
    from megatron_async_rlhf.estimate.report import refuse_too_large
    from megatron_async_rlhf.jobs.inputs import check_inputs, data_warnings, make_model_template
    from megatron_async_rlhf.launch.input_digests import check_resumed_inputs
    from megatron_async_rlhf.launch.plan import plan_processes
    from megatron_async_rlhf.launch.start import Start

    found = _find_resumption(config, resume)
    if found.finished:
        return None
    run_dir, version = config.run.path.absolute(), found.version
    template = scratch / "model" if version is None else run_dir / POLICY_TEMPLATE_DIR
    if version is None:
        make_model_template(config, template)
    run_inputs = check_inputs(config, template)
    refuse_too_large(config, run_inputs.architecture)
    note(run_inputs.data.notes)
    warn(data_warnings(config, run_inputs))
    digests, warnings = check_resumed_inputs(config, run_inputs, is_new=version is None)
    warn(warnings)
    budget, context = generator_budget(config, run_inputs.architecture), run_inputs.architecture.context_length
    plan = plan_processes(config, run_dir, context, fleet.nodes, version, budget=budget)
    check_again = partial(check_resumed_inputs, config)
    return Start(plan=plan, template=template, version=version, digests=digests, check_again=check_again)


def _decide_sft(config: RunConfig, resume: bool, fleet: "Fleet", scratch: Path) -> "Start | None":
    """How many steps there are the data says, so that is read first."""
    from megatron_async_rlhf.checkpoint.run_checkpoints import RunCheckpoints
    from megatron_async_rlhf.jobs.inputs import make_model_template
    from megatron_async_rlhf.jobs.supervised_inputs import check_supervised_inputs, load_supervised_inputs
    from megatron_async_rlhf.launch.plan import plan_learner_alone
    from megatron_async_rlhf.launch.resume import Resumption, find_resumption
    from megatron_async_rlhf.launch.run_directory import check_inputs_apart
    from megatron_async_rlhf.launch.start import Start
    from megatron_async_rlhf.launch.supervised_digests import check_same_rows, digest_supervised

    run_dir = config.run.path.absolute()
    template = run_dir / POLICY_TEMPLATE_DIR
    has_begun = RunCheckpoints(run_dir).versions() or is_completed(run_dir)
    if not (resume and has_begun):  # one that was killed while its directory was made may have no template
        check_inputs_apart(config)
        template = scratch / "model"
        make_model_template(config, template)
    inputs = check_supervised_inputs(config, template)
    note(inputs.data.notes)
    steps = len(inputs.batches)
    key = "sft.steps" if config.sft is not None else "warm_start.steps"
    found = find_resumption(config, steps=steps, key=key, has_reference=False) if resume else Resumption()
    if _is_finished(found):
        return None
    digests = digest_supervised(config, inputs)
    if found.version is not None:
        check_same_rows(config, digests)
    if found.version is None and template == run_dir / POLICY_TEMPLATE_DIR:  # which is set aside now
        check_inputs_apart(config)
        template = shutil.copytree(template, scratch / "model")
    plan = plan_learner_alone(config, run_dir, fleet.nodes, "sft", resume_from=found.version)

    def check_again() -> None:
        now = load_supervised_inputs(config, run_dir / POLICY_TEMPLATE_DIR)
        check_same_rows(config, digest_supervised(config, now))

    return Start(plan=plan, template=template, version=found.version, digests=digests, check_again=check_again)


def _find_resumption(config: RunConfig, resume: bool) -> "Resumption":
    """What a run continues from, told to the user; a new one must not take the place of what it reads."""
    from megatron_async_rlhf.checkpoint.run_checkpoints import has_own_reference
    from megatron_async_rlhf.launch.resume import Resumption, find_resumption
    from megatron_async_rlhf.launch.run_directory import check_inputs_apart

    found = Resumption()
    if resume:
        steps, has_reference = config.schedule.steps, has_own_reference(config)
        found = find_resumption(config, steps=steps, key="schedule.steps", has_reference=has_reference)
    if not _is_finished(found) and found.version is None:
        check_inputs_apart(config)
    return found


def _is_finished(found: "Resumption") -> bool:
    """Tells the user what was found."""
    if found.note:
        typer.echo(found.note)
    return found.finished
