"""Our stages for NeMo-Run's own command line: `nemo async-rlhf train config=examples/quickstart.yaml run.executor=local`.

They are experiments, not tasks: NeMo-Run would start a task by importing itself on the machine that trains, where it is
not installed.
"""

import nemo_run as run

from megatron_async_rlhf.launch.nemo import recipes
from megatron_async_rlhf.launch.nemo.executors import SETUP, TASK_ARGUMENTS, local_executor

NAMESPACE = "async-rlhf"
# Outside of the factory, each call in which becomes part of a configuration.
_TASK_ARGUMENTS, _SETUP_LINES = list(TASK_ARGUMENTS), "\n".join(SETUP)


@run.cli.entrypoint(namespace=NAMESPACE, type="experiment")
def sft(ctx: run.cli.RunContext, config: str, overrides: list[str] = [], python: str = "") -> None:
    """The warm start alone."""
    _launch(ctx, "sft", recipes.sft(config, overrides, python=python or None))


@run.cli.entrypoint(namespace=NAMESPACE, type="experiment")
def train(ctx: run.cli.RunContext, config: str, overrides: list[str] = [], python: str = "") -> None:
    """The RLHF run; give the executor as many nodes as launch.nodes says."""
    _launch(ctx, "train", recipes.train(config, overrides, python=python or None))


@run.cli.entrypoint(namespace=NAMESPACE, type="experiment")
def export_hf(ctx: run.cli.RunContext, run_dir: str, out: str, python: str = "") -> None:
    """The Hugging Face directory of a run's last policy."""
    _launch(ctx, "export-hf", recipes.export_hf(run_dir, out, python=python or None))


@run.cli.factory
@run.autoconvert
def local() -> run.LocalExecutor:
    return run.LocalExecutor(packager=run.Packager())


@run.cli.factory
@run.autoconvert
def slurm() -> run.SlurmExecutor:
    """With a local tunnel; whole machines, one task each. The rest by executor.account=..., executor.nodes=..."""
    return run.SlurmExecutor(
        account=None,
        job_name_prefix="async-rlhf.",
        exclusive=True,
        mem="0",
        ntasks_per_node=1,
        packager=run.Packager(),
        srun_args=_TASK_ARGUMENTS,
        setup_lines=_SETUP_LINES,
        tunnel=run.LocalTunnel(job_dir=""),
    )


def _launch(ctx: run.cli.RunContext, name: str, script: run.Script) -> None:
    with run.Experiment(name, executor=ctx.executor or local_executor()) as experiment:
        experiment.add(script, name=name, tail_logs=ctx.tail_logs)
        ctx.executor = experiment.executor  # without one NeMo-Run would run the script in its own process
        ctx.launch(experiment)
