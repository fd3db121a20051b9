"""What every command that starts processes says first of the shell, container or pod it was started in."""

import os
from collections.abc import Iterable

import typer

from megatron_async_rlhf.environment import environment_problems, ignored_line
from megatron_async_rlhf.errors import ConfigError


def check_surroundings(*further: str | None) -> None:
    """
    Raises:
        ConfigError: a line for each thing of this shell or container that a run can neither work with nor ignore.
    """
    found = [*environment_problems(os.environ), *filter(None, further)]
    if found:
        raise ConfigError("\n".join(found))
    warn(filter(None, [ignored_line(os.environ)]))


def warn(lines: Iterable[str]) -> None:
    for line in lines:
        typer.echo(f"warning: {line}", err=True)
