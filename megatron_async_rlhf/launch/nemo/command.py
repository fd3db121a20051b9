"""`async-rlhf launch`: from the command line to jobs, and what became of them. NeMo-Run itself is behind `launch.nemo`."""

import importlib.util
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from megatron_async_rlhf.config.cluster import SlurmKeys
from megatron_async_rlhf.config.load import check_tree, read_tree, set_key
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.config.warnings import config_warnings
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.launch.recipe import Recipe, is_recipe, load_recipe, stages_of
from megatron_async_rlhf.launch.stages import Stage, expand_stages, parse_stages
from megatron_async_rlhf.options import SetOption, note, warn
from megatron_async_rlhf.telemetry.summary import is_completed

_SET_UP = "bash tools/setup_launch_env.sh"
_TITLE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # names a directory and jobs
_IS_RECIPE = (
    "is a recipe, which names its stages, and their machines in launch.nodes: remove --stages, --export-to, --resume and "
    "--nodes; stages that are done are not made again"
)
_PANEL = "Slurm, instead of launch.slurm in the configuration"
_Tunnel = Literal["local", "ssh"]


def _slurm(help: str) -> Any:
    """An option that takes the place of a key of launch.slurm."""
    return typer.Option(help=help, rich_help_panel=_PANEL)


def launch(
    config: Annotated[
        Path, typer.Argument(help="YAML configuration, such as examples/quickstart.yaml, or a recipe of stages.")
    ],
    executor: Annotated[
        Literal["local", "slurm"], typer.Option(help="Where the stages run: this machine, or a Slurm cluster.")
    ],
    set: SetOption = [],
    stages: Annotated[
        str | None,
        typer.Option(help="Comma-separated stages to run: sft, train, export. Default: train; of a recipe all."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the experiment; default: run.name.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue with what an earlier launch has left.")] = False,
    export_to: Annotated[Path | None, typer.Option(help="What export writes; default: <run.dir>-hf.")] = None,
    python: Annotated[
        str | None, typer.Option(help="Python of the environment that trains; default: that of .venv.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print all that would be submitted.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for jobs of Slurm too, and exit as they did.")] = False,
    account: Annotated[str | None, _slurm("Account to charge.")] = None,
    partition: Annotated[str | None, _slurm("Partition to submit to.")] = None,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Machines; default: launch.nodes.", rich_help_panel=_PANEL)
    ] = None,
    time: Annotated[str | None, _slurm("Time limit of each stage: hours:minutes:seconds.")] = None,
    tunnel: Annotated[_Tunnel | None, _slurm("How Slurm is reached: from this machine, or by ssh.")] = None,
    host: Annotated[str | None, _slurm("Host name of the login node.")] = None,
    user: Annotated[str | None, _slurm("User name on the login node.")] = None,
    job_dir: Annotated[str | None, _slurm("Directory on the cluster for scripts and logs.")] = None,
    project_dir: Annotated[str | None, _slurm("Directory on the cluster in which stages run.")] = None,
    container: Annotated[str | None, _slurm("Container image, for Pyxis.")] = None,
) -> None:
    """Run stages through NeMo-Run: here, or as jobs of a Slurm cluster, each when the one before has succeeded.

    Exit code 0: all stages succeeded, or are queued; 1: one failed; 130: interrupted.

    Example: async-rlhf launch examples/quickstart.yaml --executor slurm --account team --stages sft,train --dry-run
    """
    recipe = load_recipe(config, set) if is_recipe(config) else None
    if recipe is not None and (stages or export_to or resume or nodes):
        raise ConfigError(f"{config} {_IS_RECIPE}")
    tree = read_tree(config, set) if recipe is None else recipe.stages[0].config.model_dump(mode="json")
    options = dict(account=account, partition=partition, time=time, tunnel=tunnel, host=host, user=user)
    options |= dict(job_dir=job_dir, project_dir=project_dir, container=container)
    given = {key: value for key, value in options.items() if value is not None}
    resolved = _resolved(tree, given, nodes)
    _check_executor(executor, resolved, list(given))
    title = _checked_title(name or (resolved.run.name if recipe is None else recipe.name))
    warn(config_warnings(resolved))
    slurm = (resolved.launch.slurm or SlurmKeys()) if executor == "slurm" else None
    parts = _left(recipe, slurm) if recipe else _parts(tree, stages or "train", slurm, resume, export_to)
    if not parts:
        return typer.echo(f"{title}: all stages are completed")
    _find_nemo_run(slurm)
    if slurm is None:
        raise typer.Exit(_run_here(title, parts, python, dry_run))
    raise typer.Exit(_run_on_slurm(title, parts, resolved, python, dry_run, wait))


def _resolved(tree: dict[str, Any], slurm_keys: dict[str, Any], nodes: int | None) -> RunConfig:
    """With what the options say, which goes into the tree too."""
    for key, value in slurm_keys.items():
        set_key(tree, f"launch.slurm.{key}", value)
    if nodes is not None:
        set_key(tree, "launch.nodes", nodes)
    return check_tree(tree)


def _left(recipe: Recipe, slurm: SlurmKeys | None) -> list[Stage]:
    """The stages that are not completed, and those that read from one that is made anew."""
    base = _project_dir(slurm)
    left: list[Stage] = []
    for stage, part in zip(recipe.stages, stages_of(recipe, None if slurm is None else slurm.time_s), strict=True):
        if is_completed(base / part.result) and not {earlier.name for earlier in left} & set(stage.needs):
            note([f"{part.name}: {part.result} is completed, and left out; remove it to have it made anew"])
        else:
            left.append(part)
    return left


def _parts(
    tree: dict[str, Any], stages: str, slurm: SlurmKeys | None, resume: bool, export_to: Path | None
) -> list[Stage]:
    """The stages that one configuration stands for."""
    return expand_stages(
        tree,
        parse_stages(stages),
        resume=resume,
        export_to=export_to,
        directory=_project_dir(slurm),
        seconds=None if slurm is None else slurm.time_s,
    )


def _project_dir(slurm: SlurmKeys | None) -> Path:
    """Where relative paths of stages begin."""
    return (slurm and slurm.project_dir) or Path.cwd()


def _checked_title(title: str) -> str:
    if not _TITLE.fullmatch(title):
        raise ConfigError(f"--name {title}: letters, digits and ._- can be part of it")
    return title


def _check_executor(executor: str, config: RunConfig, slurm_options: list[str]) -> None:
    if executor == "local":
        if config.launch.nodes > 1:
            raise ConfigError(
                f"launch.nodes = {config.launch.nodes} with --executor local: it is one machine; use slurm"
            )
        if slurm_options:
            raise ConfigError(f"--{slurm_options[0].replace('_', '-')} is for --executor slurm")


def _find_nemo_run(slurm: SlurmKeys | None) -> None:
    """Look for it, and say where its home is, which it reads when it is imported."""
    if importlib.util.find_spec("nemo_run") is None:
        raise ConfigError(
            f"NeMo-Run is not installed here, and its pins clash with vLLM's: `{_SET_UP}` makes an environment for it; "
            "then call .venv-launch/bin/async-rlhf launch"
        )
    if slurm is not None and slurm.tunnel == "local" and slurm.job_dir is not None:
        os.environ["NEMORUN_HOME"] = str(slurm.job_dir.absolute())


def _run_here(title: str, stages: list[Stage], python: str | None, dry_run: bool) -> int:
    from megatron_async_rlhf.launch.nemo import submission
    from megatron_async_rlhf.launch.nemo.recipes import local_jobs

    jobs = local_jobs(stages, python)
    if dry_run:
        submission.dry_run(title, jobs, typer.echo)
        return submission.EXIT_COMPLETED
    return submission.run_here(title, jobs, typer.echo)


def _run_on_slurm(
    title: str, stages: list[Stage], config: RunConfig, python: str | None, dry_run: bool, wait: bool
) -> int:
    from megatron_async_rlhf.launch.nemo import slurm_states, submission
    from megatron_async_rlhf.launch.nemo.recipes import slurm_jobs

    jobs = slurm_jobs(title, stages, config, python)
    submission.check_paths(jobs)
    if dry_run:
        submission.dry_run(title, jobs, typer.echo)
        return submission.EXIT_COMPLETED
    queued = submission.submit(title, jobs)
    for job in queued:
        typer.echo(
            f"{job.name}: job {job.job_id} on {job.nodes} {'node' if job.nodes == 1 else 'nodes'}, log {job.log}"
        )
    ids = [job.job_id for job in queued]
    typer.echo(f"how they are: squeue -j {','.join(ids)}; end them: scancel {' '.join(ids)}")
    return int(not slurm_states.follow(queued, typer.echo)) if wait else submission.EXIT_COMPLETED
