"""The `async-rlhf` command."""

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from megatron_async_rlhf.config.load import dump_config, load_config
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import AsyncRLHFError, ConfigError, DataError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

_EXIT_BAD_INPUT = 2

ConfigArgument = Annotated[Path, typer.Argument(help="YAML configuration, such as examples/quickstart.yaml.")]
SetOption = Annotated[list[str], typer.Option("--set", "-s", help="Override one key: section.key=value. Repeatable.")]


@app.callback()
def _root() -> None:
    """Asynchronous RLHF: Megatron-core learns while vLLM generates."""


@app.command()
def train(
    config: ConfigArgument,
    set: SetOption = [],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan, start nothing.")
    ] = False,
) -> None:
    """Run the whole RLHF job on this machine.

    Example: async-rlhf train examples/quickstart.yaml -s schedule.mode=sync -s run.name=sync
    """
    from megatron_async_rlhf.launch.plan import plan_processes
    from megatron_async_rlhf.launch.run_directory import check_writable, create_run_directory
    from megatron_async_rlhf.prepare import load_materials, make_model_template

    resolved = load_config(config, set)
    check_writable(resolved)
    with tempfile.TemporaryDirectory() as scratch:
        template = Path(scratch) / "model"
        make_model_template(resolved, template)
        materials = load_materials(resolved, template)
        plan = plan_processes(resolved, resolved.run.path.absolute(), materials.architecture.context_length)
        if dry_run:
            _print_plan(resolved, plan, materials)
            return
        run_dir, aside = create_run_directory(resolved, template)
    if aside is not None:
        typer.echo(f"an earlier run is now in {aside}")

    from megatron_async_rlhf.launch.display import Display
    from megatron_async_rlhf.launch.local import Supervisor

    raise typer.Exit(Supervisor(resolved, plan, run_dir, Display()).run())


def _print_plan(config: RunConfig, plan, materials) -> None:
    typer.echo(dump_config(config))
    typer.echo(f"# policy: {materials.architecture.num_parameters / 1e6:.2f} M parameters")
    typer.echo(f"# prompts: {len(materials.train)} to train on, {len(materials.eval)} held out")
    for process in plan.processes:
        cores = f"cores {process.cores}" if process.cores else "any core"
        typer.echo(f"# {process.name}: {cores}: {' '.join(process.arguments)}")


def main() -> None:
    """Entry point; errors the user can mend are one line each on stderr, exit code 2 before anything started."""
    try:
        app(standalone_mode=True)
    except (ConfigError, DataError) as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        raise SystemExit(_EXIT_BAD_INPUT) from None
    except AsyncRLHFError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
