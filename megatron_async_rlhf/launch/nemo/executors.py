"""NeMo-Run's executors, from our configuration: this machine, or a Slurm cluster."""

from pathlib import Path

import nemo_run as run

from megatron_async_rlhf.config.cluster import SlurmKeys
from megatron_async_rlhf.environment import STARTED

SETUP = (
    "unset SLURM_UNBUFFEREDIO",  # of NeMo-Run: srun would give the command a terminal for its output
    # Of a job that this one was submitted from: srun refuses them beside what this one asks for.
    '[ -z "$SLURM_MEM_PER_NODE" ] || unset SLURM_MEM_PER_CPU SLURM_MEM_PER_GPU',
    f"export {STARTED}=$(date +%s)",  # what comes before the run, as the import of an image, is of its time limit too
)
# A run places its processes itself, and ends its tasks in its own order, one with an exit code after the other.
TASK_ARGUMENTS = ("--kill-on-bad-exit=0", "--cpu-bind=none")


def local_executor() -> run.LocalExecutor:
    return run.LocalExecutor(packager=run.Packager())


def slurm_executor(
    keys: SlurmKeys, *, title: str, nodes: int = 1, gpus_per_node: int | None = None
) -> run.SlurmExecutor:
    """For one job: a task on each of so many machines. The project must be on the cluster already: no code is sent there."""
    task_arguments = [*TASK_ARGUMENTS, *keys.srun]
    if keys.cpus_per_node is not None:  # srun does not ask for what sbatch was given
        task_arguments.append(f"--cpus-per-task={keys.cpus_per_node}")
    project = str(project_dir(keys))
    return run.SlurmExecutor(
        account=keys.account,
        partition=keys.partition,
        qos=keys.qos,
        time=keys.time,
        nodes=nodes,
        ntasks_per_node=1,
        cpus_per_task=keys.cpus_per_node,
        gpus_per_node=gpus_per_node if keys.request_gpus else None,
        mem=keys.memory,
        exclusive=True if keys.exclusive else None,
        container_image=keys.container,
        container_mounts=[f"{project}:{project}", *keys.container_mounts] if keys.container else [],
        additional_parameters=dict(keys.sbatch),
        srun_args=task_arguments,
        retries=keys.retries,
        tunnel=_tunnel(keys),
        packager=run.Packager(),
        poll_estimated_start_time=False,
        job_name_prefix=f"{title}.",
        setup_lines="\n".join(SETUP),
    )


def project_dir(keys: SlurmKeys) -> Path:
    return keys.project_dir if keys.project_dir is not None else Path.cwd()


def _tunnel(keys: SlurmKeys) -> run.LocalTunnel | run.SSHTunnel:
    if keys.tunnel == "local":
        # Scripts are not copied on the way: they stay where the experiment is, in NeMo-Run's home.
        return run.LocalTunnel(job_dir="")
    return run.SSHTunnel(
        host=keys.host,
        user=keys.user,
        port=keys.port,
        identity=str(keys.identity) if keys.identity is not None else None,
        job_dir=str(keys.job_dir),
    )
