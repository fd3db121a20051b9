"""The `async-rlhf` command: registers the commands, each of which is in the package it is about."""

import sys
from typing import Annotated

import typer

from megatron_async_rlhf import __version__
from megatron_async_rlhf.compare.command import compare
from megatron_async_rlhf.config.commands import schema
from megatron_async_rlhf.converter.command import export_hf, import_hf, verify_checkpoint, verify_weights
from megatron_async_rlhf.doctor.command import doctor
from megatron_async_rlhf.first_config.command import init
from megatron_async_rlhf.interpreter import check_working_directory, collect_rarely, print_anything, use_utf8
from megatron_async_rlhf.launch.command import replay, sft, train
from megatron_async_rlhf.launch.evaluation import evaluate
from megatron_async_rlhf.launch.nemo.command import launch
from megatron_async_rlhf.launch.reward_model_command import reward_model
from megatron_async_rlhf.launch.watch import watch
from megatron_async_rlhf.limits import raise_soft_limits
from megatron_async_rlhf.pipeline.command import pipeline
from megatron_async_rlhf.plan.command import plan
from megatron_async_rlhf.report.command import report
from megatron_async_rlhf.simulate.command import simulate
from megatron_async_rlhf.sweep.command import sweep
from megatron_async_rlhf.usage import run_command_line

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"megatron_async_rlhf {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Say it and end.")
    ] = False,
) -> None:
    """Asynchronous RLHF: Megatron-core learns while vLLM generates."""
    check_working_directory()


for command in (
    init,
    doctor,
    train,
    simulate,
    plan,
    launch,
    sft,
    reward_model,
    pipeline,
    replay,
    sweep,
    compare,
    report,
    watch,
    schema,
    import_hf,
    export_hf,
    verify_weights,
    verify_checkpoint,
):
    app.command()(command)
app.command("eval")(evaluate)


def main() -> None:
    """Entry point; errors the user can mend are one line each on stderr, exit code 2 before anything started."""
    use_utf8()
    print_anything()
    collect_rarely()
    raise_soft_limits()
    raise SystemExit(run_command_line(app, sys.argv[1:]))
