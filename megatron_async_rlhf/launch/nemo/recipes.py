"""Our stages as NeMo-Run's `run.Script`, for experiments of one's own, and as the jobs that `async-rlhf launch` submits.

from megatron_async_rlhf.launch.nemo.recipes import train

with run.Experiment("llama8b") as experiment:
    experiment.add(train("examples/llama8b_async.yaml"), executor=...)
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import nemo_run as run

import megatron_async_rlhf
from megatron_async_rlhf.config.cluster import SlurmKeys
from megatron_async_rlhf.config.load import read_tree
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.launch.job_script import job_script
from megatron_async_rlhf.launch.nemo.executors import local_executor, project_dir, slurm_executor
from megatron_async_rlhf.launch.nemo.submission import Job
from megatron_async_rlhf.launch.stages import Stage, expand_stages


def sft(
    config: str | Path, overrides: Iterable[str] = (), *, python: str | None = None, directory: str | None = None
) -> run.Script:
    """`async-rlhf sft`, in `<run.dir>-sft`.

    Args:
        overrides: `section.key=value`.
        python: of the environment that trains; default: the project's `.venv`, else `python3`.
        directory: where it runs, there; default: the current one.

    Raises:
        ConfigError: one line per problem.
    """
    return _script("sft", config, overrides, python, directory)


def train(
    config: str | Path,
    overrides: Iterable[str] = (),
    *,
    python: str | None = None,
    directory: str | None = None,
    resume: bool = False,
) -> run.Script:
    """`async-rlhf train`, to be run once on each of `launch.nodes` machines. Otherwise as `sft`."""
    return _script("train", config, overrides, python, directory, resume=resume)


def export_hf(
    run_dir: str | Path, out: str | Path, *, python: str | None = None, directory: str | None = None
) -> run.Script:
    """`async-rlhf export-hf`."""
    stage = Stage(name="export", arguments=["export-hf", str(run_dir), str(out)], result=Path(out))
    return run.Script(inline=job_script(stage, python=python or own_python(), directory=directory or str(Path.cwd())))


def local_jobs(stages: Sequence[Stage], python: str | None) -> list[Job]:
    interpreter, directory = python or own_python(), str(Path.cwd())
    return [
        Job(
            name=stage.name,
            script=run.Script(inline=job_script(stage, python=interpreter, directory=directory, pid_file=True)),
            executor=local_executor(),
        )
        for stage in stages
    ]


def slurm_jobs(title: str, stages: Sequence[Stage], config: RunConfig, python: str | None) -> list[Job]:
    """One for each stage, on as many machines as it needs, by `launch.slurm`."""
    keys = config.launch.slurm or SlurmKeys()
    elsewhere = keys.container is not None or keys.tunnel == "ssh"
    interpreter = python or keys.python or ("python3" if elsewhere else own_python())
    own = config.launch.gpus_per_node if config.run.device == "cuda" else None
    return [
        Job(
            name=stage.name,
            script=run.Script(
                inline=job_script(
                    stage,
                    python=interpreter,
                    directory=str(project_dir(keys)),
                    environment=keys.environment,
                    setup=keys.setup,
                )
            ),
            executor=slurm_executor(keys, title=title, nodes=stage.nodes, gpus_per_node=stage.gpus_per_node or own),
        )
        for stage in stages
    ]


def own_python() -> str:
    """The interpreter of the project's `.venv`, else the one on PATH."""
    own = Path(megatron_async_rlhf.__file__).resolve().parents[1] / ".venv/bin/python"
    return str(own) if own.exists() else "python3"


def _script(
    name: str,
    config: str | Path,
    overrides: Iterable[str],
    python: str | None,
    directory: str | None,
    resume: bool = False,
) -> run.Script:
    where = Path(directory) if directory is not None else Path.cwd()
    (stage,) = expand_stages(read_tree(Path(config), overrides), [name], directory=where, resume=resume)
    return run.Script(inline=job_script(stage, python=python or own_python(), directory=str(where)))
