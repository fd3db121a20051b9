"""What has become of a run that a sweep or a pipeline started, as its directory tells."""

from typing import Literal

from msgspec import Struct

from megatron_async_rlhf.config.load import load_config
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.telemetry.files import RESOLVED_CONFIG
from megatron_async_rlhf.telemetry.summary import read_summary

# `changed`: there is a run, but of another configuration than it is now.
Status = Literal["completed", "failed", "interrupted", "changed", "to do"]


class Progress(Struct, frozen=True, kw_only=True):
    """How far a run is; `error` is what it failed with."""

    status: Status
    error: str | None = None


def progress_of(config: RunConfig) -> Progress:
    """What `run.dir` holds. A run that never wrote its end counts as interrupted."""
    directory = config.run.path
    path = directory / RESOLVED_CONFIG
    if not path.is_file():
        return Progress(status="to do")
    try:
        if load_config(path) != config:
            return Progress(status="changed")
    except ConfigError:  # written by a version with other keys
        return Progress(status="changed")
    summary = read_summary(directory)
    status = summary.get("status")
    if status not in ("completed", "failed"):
        return Progress(status="interrupted")
    return Progress(status=status, error=summary.get("error"))
