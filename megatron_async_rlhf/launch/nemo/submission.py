"""Hands stages to NeMo-Run: shows what it would submit, runs them on this machine, or queues them with Slurm.

NeMo-Run does not wait for us. On one machine it starts a stage although the one before it has failed, so each stage is an
experiment of its own there; on a cluster without accounting it gives up on jobs after a minute, so that is done in
`nemo.slurm_states`.
"""

import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import invoke
import nemo_run as run
from msgspec import Struct
from nemo_run.config import get_nemorun_home

from megatron_async_rlhf.errors import ConfigError, SubmissionError
from megatron_async_rlhf.launch.nemo.slurm_states import QueuedJob
from megatron_async_rlhf.launch.terminal import handling_interrupts

EXIT_COMPLETED, EXIT_FAILED, EXIT_INTERRUPTED = 0, 1, 130
# NeMo-Run writes this for the job's directory and, without a container, replaces it wherever it stands.
_RESERVED_PATH = "/nemo_run"

Note = Callable[[str], None]


class Job(Struct, frozen=True, kw_only=True):
    """A stage as NeMo-Run takes it; it needs the one before it."""

    name: str
    script: run.Script
    executor: run.Executor


def dry_run(title: str, jobs: Sequence[Job], show: Note) -> None:
    """Shows every file and command NeMo-Run would submit; nothing is left of them."""
    with _experiment(title) as experiment:
        _add(experiment, jobs)
        try:
            experiment.dryrun(log=False, delete_exp_dir=False)
            for job, before in zip(experiment.jobs, [None, *jobs], strict=False):
                _show(job, before, show)
        finally:
            shutil.rmtree(_directory(experiment), ignore_errors=True)


def run_here(title: str, jobs: Sequence[Job], note: Note) -> int:
    """Run one job after the other until one fails; their output is shown.

    Ctrl-C and SIGTERM are passed on to the job under way, which saves and ends; no other starts then.

    Returns:
        The exit code: 0 all succeeded, 1 one failed, 130 interrupted.
    """
    running: list[Path] = []  # where the process id of the job under way is
    interrupts: list[int] = []

    def on_interrupt(number: int, frame: object) -> None:
        interrupts.append(number)
        for file in running:
            _pass_on(file, signal.SIGTERM if len(interrupts) == 1 else signal.SIGINT)

    with handling_interrupts(on_interrupt):
        for job in jobs:
            with _experiment(title) as experiment:
                _add(experiment, [job])
                running[:] = [Path(experiment.jobs[0].executor.job_dir, "scripts", f"{job.name}.sh.pid")]
                note(f"{job.name}: logs in {_directory(experiment)}")
                experiment.run(tail_logs=True)
            running.clear()
            succeeded = experiment.jobs[0].state.name == "SUCCEEDED"
            note(f"{job.name}: {'succeeded' if succeeded else 'interrupted' if interrupts else 'failed'}")
            if interrupts:
                return EXIT_INTERRUPTED
            if not succeeded:
                return EXIT_FAILED
    return EXIT_COMPLETED


def submit(title: str, jobs: Sequence[Job]) -> list[QueuedJob]:
    """Queue all jobs with Slurm, each to start when the one before has succeeded.

    Raises:
        SubmissionError: sbatch refused one, or the cluster cannot be reached.
    """
    for job in jobs[1:]:  # else it would wait for ever when the one before has failed
        job.executor.additional_parameters["kill_on_invalid_dep"] = "yes"
    with _experiment(title) as experiment:
        _add(experiment, jobs)
        try:
            experiment.run(detach=True)
        except invoke.exceptions.UnexpectedExit as error:
            raise SubmissionError(_refusal(error, experiment)) from None
        except (OSError, EOFError, RuntimeError) as error:
            raise SubmissionError(f"jobs cannot be submitted: {_first_line(error)}; nothing was") from None
        except SystemExit:  # NeMo-Run's way of saying so
            tunnel = jobs[0].executor.tunnel
            raise SubmissionError(
                f"ssh: no login as {tunnel.user} on {tunnel.host}; set launch.slurm.identity, or use ssh's agent"
            ) from None
        return [_queued(job) for job in experiment.jobs]


def check_paths(jobs: Sequence[Job]) -> None:
    """Of jobs for Slurm.

    Raises:
        ConfigError: a path that NeMo-Run would change.
    """
    home = get_nemorun_home()
    for job in jobs:
        if job.executor.container_image is None:
            words = [word for text in (job.script.inline, home) for word in text.split() if _RESERVED_PATH in word]
            if words:
                raise ConfigError(
                    f"{words[0]}: NeMo-Run replaces {_RESERVED_PATH} in every path by the job's directory; give the "
                    "directory another name, as by a symbolic link"
                )


def _experiment(title: str) -> run.Experiment:
    return run.Experiment(
        title,
        log_level="WARNING",
        clean_mode=True,
        enable_goodbye_message=False,
        skip_status_at_exit=True,  # it would ask sacct
    )


def _add(experiment: run.Experiment, jobs: Sequence[Job]) -> None:
    before: list[str] = []
    for job in jobs:
        before = [experiment.add(job.script, executor=job.executor, name=job.name, dependencies=before)]


def _directory(experiment: run.Experiment) -> str:
    return experiment.jobs[0].executor.experiment_dir


def _show(job: Any, before: Job | None, show: Note) -> None:
    """One job of an experiment that was only prepared."""
    scripts = Path(job.executor.job_dir, "scripts")
    if isinstance(job.executor, run.SlurmExecutor):
        tunnel = job.executor.tunnel
        file = f"{job.executor.job_name}_sbatch.sh"
        dependency = [f"--dependency=afterok:<job id of {before.name}>"] if before is not None else []
        where = "" if isinstance(tunnel, run.LocalTunnel) else f" (on {tunnel.host}, as {tunnel.user})"
        show(
            f"# {job.id}: {' '.join(['sbatch --requeue --parsable', *dependency, os.path.join(tunnel.job_dir, file)])}{where}"
        )
        show(Path(job.executor.experiment_dir, file).read_text(encoding="utf-8"))
        show(f"# {job.id}: {os.path.join(tunnel.job_dir, job.id, 'scripts', f'{job.id}.sh')}")
    else:
        after = f", if {before.name} has succeeded" if before is not None else ""
        show(f"# {job.id}: bash {scripts / f'{job.id}.sh'}{after}")
    show((scripts / f"{job.id}.sh").read_text(encoding="utf-8"))


def _pass_on(pid_file: Path, number: int) -> None:
    try:
        os.kill(int(pid_file.read_text(encoding="utf-8")), number)
    except (OSError, ValueError):
        pass  # not started yet, or gone


def _queued(job: Any) -> QueuedJob:
    executor = job.executor
    job_id = job.handle.rpartition("/")[2]  # slurm_tunnel://nemo_run/<id>
    log = str(executor.job_details.srun_stdout).replace("%j", job_id).replace("${SLURM_RESTART_COUNT:-0}", "0")
    return QueuedJob(name=job.id, job_id=job_id, nodes=executor.nodes, log=log, tunnel=executor.tunnel)


def _refusal(error: invoke.exceptions.UnexpectedExit, experiment: run.Experiment) -> str:
    queued = [_queued(job).job_id for job in experiment.jobs if job.handle]
    earlier = f"jobs {' '.join(queued)} were submitted: scancel them" if queued else "nothing was submitted"
    return f"{error.result.command.split()[0]} failed: {_first_line(error.result.stderr)}; {earlier}"


def _first_line(error: object) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
