"""What `train`, `sft`, `replay` and `eval` have in common: from a configuration to processes that are supervised until they end.

this machine ─> the other machines ─> run directory is ours ─> inputs, plan (the command's own) ─> directory ─> supervise
"""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import typer
from msgspec import Struct

from megatron_async_rlhf.config.differences import differences
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.launch.agent import serve
from megatron_async_rlhf.launch.display import Display
from megatron_async_rlhf.launch.fleet import Fleet, gather
from megatron_async_rlhf.launch.held_memory import HeldMemory
from megatron_async_rlhf.launch.input_digests import write_input_digests
from megatron_async_rlhf.launch.nodes import check_node_rank
from megatron_async_rlhf.launch.owner import owning
from megatron_async_rlhf.launch.plan import ProcessPlan
from megatron_async_rlhf.launch.run_directory import (
    check_writable,
    create_run_directory,
    keep_run_directory,
    reopen_run_directory,
    writing_run_directory,
)
from megatron_async_rlhf.launch.supervisor import Supervisor
from megatron_async_rlhf.launch.surroundings import check_surroundings
from megatron_async_rlhf.launch.terminal import outlive_readers
from megatron_async_rlhf.options import warn
from megatron_async_rlhf.run_secret import write_secret
from megatron_async_rlhf.run_tls import write_certificate
from megatron_async_rlhf.telemetry.files import INPUTS
from megatron_async_rlhf.telemetry.sinks.opening import check_sinks


class Start(Struct, frozen=True, kw_only=True):
    """What is to be started.

    Attributes:
        template: the policy without its weights; a new run's directory gets a copy.
        version: of the checkpoint that a run continues from.
        keeps: what is in the directory already, and is continued with as it is.
        prepare: makes what else belongs into the directory, before anything is started.
        digests: of what the run reads, to be remembered if they are not yet.
        check_again: raises where what it reads is something else by now.
    """

    plan: ProcessPlan
    template: Path
    version: int | None = None
    keeps: bool = False
    prepare: Callable[[Path], None] | None = None
    digests: Struct | None = None
    check_again: Callable[[], object] | None = None


def prepare_machine(config: RunConfig, node_rank: int, *limits: str | None) -> None:
    """Check shell, container and limits. On every machine but the first this does as that one says, then exits.

    Args:
        limits: problems with them that the caller has found.

    Raises:
        ConfigError: a line for each thing that a run can neither work with nor ignore.
    """
    check_sinks(config.telemetry)
    warn(check_surroundings(*limits))
    check_node_rank(config, node_rank)
    if node_rank:
        outlive_readers()
        raise typer.Exit(serve(config, node_rank))


def run(
    config: RunConfig, decide: Callable[[Fleet, Path], Start | None], display: Callable[[], Display] | None = None
) -> int:
    """Gather the machines, have the command decide what to start there, and supervise it; the exit code.

    Args:
        decide: checks everything, given the machines and a directory for temporary files; None: there is nothing to do.
        display: makes what shows the run; default: on the terminal, which the run then outlives.

    Raises:
        ConfigError, DataError, CheckpointError: one line; nothing was started.
    """
    check_writable(config)
    with (
        gather(config) as fleet,
        owning(config) as taken,
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch,
    ):
        start = decide(fleet, Path(scratch))
        if start is None:
            return 0
        run_dir = _open_directory(config, start)
        if start.digests is not None and not (run_dir / INPUTS).is_file():  # of a resumed run what it began with counts
            write_input_digests(run_dir, start.digests)
        if start.prepare is not None:
            start.prepare(run_dir)
        if display is None:
            outlive_readers()
        shown = display() if display is not None else Display(memory=HeldMemory(run_dir))
        shown.chosen(differences(config))
        cut_back = None if start.keeps else partial(_cut_back, config, start.check_again)
        fleet.exit_code = Supervisor(config, start.plan, run_dir, shown, fleet, cut_back=cut_back, taken=taken).run()
        return fleet.exit_code


def _cut_back(config: RunConfig, check_again: Callable[[], object] | None, version: int) -> None:
    """Make the directory what it was at a checkpoint, of a run whose data are still the same.

    Raises:
        ConfigError, DataError, CheckpointError: one line.
    """
    if check_again is not None:
        check_again()
    reopen_run_directory(config, version)


def _open_directory(config: RunConfig, start: Start) -> Path:
    """With a secret for this start, and a certificate if requests leave this machine.

    Raises:
        ConfigError: it cannot be written.
    """
    run_dir = _opened(config, start)
    with writing_run_directory(config):
        write_secret(run_dir)
        if config.launch.encrypts_http:
            write_certificate(run_dir)
    return run_dir


def _opened(config: RunConfig, start: Start) -> Path:
    """A new one says where an earlier run went."""
    if start.keeps:
        return keep_run_directory(config)
    if start.version is not None:
        return reopen_run_directory(config, start.version)
    run_dir, aside = create_run_directory(config, start.template)
    if aside is not None:
        typer.echo(f"an earlier run is now in {aside}")
    return run_dir
