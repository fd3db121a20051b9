"""How the life of every controller process begins and ends, whatever it does in between: `train`, `sft`, `replay`.

start learner ─> warm start ─> reference ─> ... ─> export
"""

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Literal

from megatron_async_rlhf.checkpoint.run_checkpoints import RunCheckpoints, has_own_reference
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.data.prompts import PromptOrder
from megatron_async_rlhf.environment import STARTED
from megatron_async_rlhf.errors import AsyncRLHFError, CheckpointError, LearnerSilentError, RewardError, WriteError
from megatron_async_rlhf.formats.directory import describe_weights
from megatron_async_rlhf.jobs.inputs import RunInputs
from megatron_async_rlhf.learner.client import LearnerClient
from megatron_async_rlhf.learner.protocol import ExportWeights, Learner, ResumeReinforcement, StartReinforcement, Stop
from megatron_async_rlhf.scheduler.warm_start import warm_start
from megatron_async_rlhf.telemetry.events import LAST_PHASE
from megatron_async_rlhf.telemetry.files import EXPORT_DIR, POLICY_TEMPLATE_DIR, writing
from megatron_async_rlhf.telemetry.recorder import Recorder

_log = logging.getLogger(__name__)

EXIT_FAILED, EXIT_INTERRUPTED = 1, 130
END_AT_ONCE = signal.SIGUSR1  # to a controller: write down what there is and end, for the others are gone


def seconds_left(config: RunConfig) -> float | None:
    """Until `checkpoint.max_run_seconds` are over; a controller that is started again gets no more."""
    limit = config.checkpoint.max_run_seconds
    if limit is None:
        return None
    passed = time.time() - float(os.environ.get(STARTED) or time.time())
    return max(0.0, limit - max(0.0, passed))


async def begin_reinforcement(config: RunConfig, learner: Learner, run_inputs: RunInputs, recorder: Recorder) -> None:
    """The warm start, if there is one, and the reference policy."""
    solvable = [prompt for prompt in run_inputs.train if prompt.index in run_inputs.solved]
    if solvable:
        recorder.phase("warm start", steps=config.warm_start.steps)
        order = PromptOrder(solvable, config.run.seed)
        await warm_start(config, learner, order, run_inputs.solved, recorder)
    await learner.execute(StartReinforcement())


async def resume_reinforcement(
    config: RunConfig, run_dir: Path, version: int, learner: Learner, recorder: Recorder
) -> None:
    """The same from the checkpoint of a run."""
    recorder.phase(f"load checkpoint of step {version}")
    checkpoints = RunCheckpoints(run_dir)
    reference = str(checkpoints.reference) if has_own_reference(config) else None
    await learner.execute(ResumeReinforcement(checkpoint=str(checkpoints.path(version)), reference=reference))


async def export_policy(config: RunConfig, run_dir: Path, learner: Learner, recorder: Recorder) -> None:
    """Into the run directory, for Hugging Face."""
    recorder.phase("export")
    directory = run_dir / EXPORT_DIR
    with writing(directory):
        describe_weights(run_dir / POLICY_TEMPLATE_DIR, directory, config.learner.weights_dtype)
    await learner.execute(ExportWeights(directory=str(directory)))


async def release_learner(learner: Learner, recorder: Recorder) -> None:
    """Its ranks leave; how they end changes nothing any more."""
    await learner.execute(Stop())
    recorder.phase(LAST_PHASE)


async def run_learner_alone(
    phases: Coroutine[Any, Any, bool | None],
    learner: LearnerClient,
    recorder: Recorder,
    stop: Callable[[], None] | None = None,
) -> int:
    """As `run_to_the_end`, of a process that drives a learner and no generators."""
    try:
        return await run_to_the_end(phases, recorder, stop)
    finally:
        learner.close()


async def run_to_the_end(
    phases: Coroutine[Any, Any, bool | None], recorder: Recorder, stop: Callable[[], None] | None = None
) -> int:
    """Run the phases of a process; its exit code. Every outcome leaves a summary.

    Args:
        phases: return whether they were stopped before their end.
        stop: called on an interrupt; without it, that ends the phases where they are.
    """
    task = asyncio.create_task(phases)
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop or task.cancel)
    asyncio.get_running_loop().add_signal_handler(END_AT_ONCE, task.cancel)
    try:
        was_stopped = await task
    except asyncio.CancelledError:
        return close_well(recorder, "interrupted")
    except BaseExceptionGroup as group:
        return close_failed(recorder, first_cause(group))
    except (AsyncRLHFError, OSError) as error:
        return close_failed(recorder, error)
    return close_well(recorder, "interrupted" if was_stopped else "completed")


def close_well(recorder: Recorder, status: Literal["completed", "interrupted"]) -> int:
    """The exit code of a run that ends as it should, unless its last files cannot be written."""
    if not recorder.close(status, None):
        return EXIT_FAILED
    return EXIT_INTERRUPTED if status == "interrupted" else 0


def close_failed(recorder: Recorder, error: BaseException) -> int:
    """Say what ended the run; its exit code."""
    line = str(error) if isinstance(error, AsyncRLHFError) else f"{type(error).__name__}: {error}"
    explained = isinstance(error, WriteError | CheckpointError | RewardError)  # the cause is outside the program
    _log.error("run failed: %s", line, exc_info=None if explained else error)
    if isinstance(error, LearnerSilentError):
        recorder.unresponsive("learner", error)
    recorder.close("failed", line, explained=explained)
    return EXIT_FAILED


def first_cause(group: BaseExceptionGroup) -> BaseException:
    """The exception that ended a task group; ours rather than a follow-up of another library."""
    leaves: list[BaseException] = []
    stack: list[BaseException] = [group]
    while stack:
        error = stack.pop(0)
        if isinstance(error, BaseExceptionGroup):
            stack = [*error.exceptions, *stack]
        else:
            leaves.append(error)
    return next((error for error in leaves if isinstance(error, AsyncRLHFError)), leaves[0])
