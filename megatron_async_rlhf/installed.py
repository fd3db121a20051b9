"""Whether this environment has the packages that a command needs, asked without loading them."""

import re
import sys
from importlib import metadata
from importlib.util import find_spec

from megatron_async_rlhf.errors import ConfigError


def check_installed(*packages: str) -> None:
    """
    Raises:
        ConfigError: one of them is not there.
    """
    for package in packages:
        if find_spec(package) is None:
            raise ConfigError(
                f"{package} is not installed here, in {sys.prefix}: bash tools/setup_env.sh, then .venv/bin/async-rlhf "
                "(or look at async-rlhf doctor)"
            )


def missing_requirements() -> list[str]:
    """What this package requires and the environment lacks, as it is written for pip: `pip install --no-deps` leaves it out."""
    try:
        required = metadata.requires("megatron-async-rlhf") or []
    except metadata.PackageNotFoundError:  # a checkout that was not installed says nothing of it
        return []
    always = [line for line in required if ";" not in line]  # the others belong to extras
    return [line for line in always if version_of(re.split(r"[^\w.-]", line)[0]) is None]


def version_of(distribution: str) -> str | None:
    """None where it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
