"""What a run goes back to when its learner has died: the newest checkpoint that is whole, and processes that start from it.

Servers stay as they are. The controller that is started anew meets them as if they had just come back: whatever weights
they hold count for nothing until its first push, and nobody waits for one that does not answer while others do.
"""

from collections.abc import Callable
from pathlib import Path

from msgspec.structs import replace

from megatron_async_rlhf.checkpoint.run_checkpoints import RunCheckpoints
from megatron_async_rlhf.errors import CheckpointError
from megatron_async_rlhf.formats.file_digests import check_digests
from megatron_async_rlhf.launch.plan import RESUME_FROM, SERVERS_STAYED, ProcessPlan, ProcessSpec

# Cuts the run's directory back to the checkpoint of a version.
CutBack = Callable[[int], object]


def newest_whole(run_dir: Path) -> int | None:
    """The version of the newest checkpoint whose files are as they were written, with the reference policy it needs."""
    checkpoints = RunCheckpoints(run_dir)
    try:
        if checkpoints.reference.is_dir():
            check_digests(checkpoints.reference)
    except CheckpointError:
        return None
    return checkpoints.newest(check_digests)[0]


def going_on_from(plan: ProcessPlan, version: int) -> list[ProcessSpec]:
    """Learner ranks and controller, in starting order."""
    arguments = list(plan.controller.arguments)
    if RESUME_FROM in arguments:
        place = arguments.index(RESUME_FROM)
        del arguments[place : place + 2]
    arguments += [RESUME_FROM, str(version)]
    if plan.servers:
        arguments.append(SERVERS_STAYED)
    return [*plan.learners, replace(plan.controller, arguments=arguments)]
