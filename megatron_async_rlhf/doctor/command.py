"""`async-rlhf doctor`: what this machine can run, and what of a configuration it cannot."""

from pathlib import Path
from typing import Annotated

import typer

from megatron_async_rlhf.config.load import load_config
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.generator.places import places_problem, threads_problem
from megatron_async_rlhf.options import SetOption


def doctor(
    config: Annotated[
        Path | None, typer.Argument(help="Also say what of this configuration the machine cannot do.")
    ] = None,
    set: SetOption = [],
) -> None:
    """Show what this machine can run, and how to get what is missing; exit code 1 if a run cannot work.

    Example: async-rlhf doctor examples/quickstart.yaml
    """
    from megatron_async_rlhf.doctor.checks import examine, problems

    cannot: list[str] = []
    resolved = None
    if config is not None:  # what is wrong with it is said at the end: the machine can be looked at all the same
        try:
            resolved = load_config(config, set)
        except ConfigError as error:
            cannot = str(error).splitlines()
    broken = False
    for finding in examine():
        remedy = f"  ({finding.remedy})" if finding.remedy and finding.state != "ok" else ""
        typer.echo(f"{finding.state:8}{finding.what}: {finding.detail}{remedy}")
        broken |= finding.state == "broken"
    if resolved is not None:
        cannot += filter(None, [places_problem(resolved), threads_problem(resolved)])
        cannot += problems(resolved) if not broken else []
    for problem in cannot:
        typer.echo(f"{'cannot':8}{problem}")
    raise typer.Exit(int(broken or bool(cannot)))
