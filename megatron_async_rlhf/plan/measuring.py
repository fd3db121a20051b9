"""A short run on this machine that says how far off the estimated speeds are here, for who has no run of the task yet.

The task's shape with a few layers ──> a fresh model on the built-in task ──> six synchronous steps ──> `calibration.calibrate`

Factors carry over: estimate and measurement are both of the small model. What it cannot show is what only many ranks have: links
between them, and pipeline bubbles.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_async_rlhf.config.load import check_tree
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.devices import gpus_here
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.estimate.fitting import needed, run_memory
from megatron_async_rlhf.estimate.generator_memory import GIB
from megatron_async_rlhf.estimate.machine import machine_memory
from megatron_async_rlhf.launch.child_command import EXIT_COMPLETED, Commands
from megatron_async_rlhf.models.architecture import Architecture
from megatron_async_rlhf.plan.analytic import Workload, step_times
from megatron_async_rlhf.simulate.prediction import shape_of

_STEPS = 6
_SECONDS = 60.0  # that all of them should take; as much again goes into starting
_LAYERS = 4
_COMPLETION = 128  # tokens of the longest
_PROMPT = 68  # of the built-in task's
_SHARE = 0.8  # of the memory


def measure_here(task: RunConfig, arch: Architecture, directory: Path, *, note: Callable[[str], None]) -> Path:
    """The directory of the run.

    Raises:
        ConfigError: no size of it fits this machine, or it failed.
    """
    config = measuring_config(task, arch, directory)
    model, schedule = config.model, config.schedule
    note(
        f"measuring: {schedule.steps} steps of {schedule.prompts_per_step * config.algorithm.samples_per_prompt} completions, "
        f"{model.layers} of {arch.layers} layers {model.hidden_size} wide"
    )
    with Commands(directory, note=note) as commands:
        if commands.run("train", "measuring", config) != EXIT_COMPLETED:
            raise ConfigError("--measure: the run that measures this machine did not complete; see above")
    return config.run.path


def measuring_config(task: RunConfig, arch: Architecture, directory: Path) -> RunConfig:
    """The largest that fits the memory, with as many prompts as there is time for."""
    on_gpu = task.run.device == "cuda"
    gpus = gpus_here() if on_gpu else 0
    if on_gpu and not gpus:
        raise ConfigError(
            "--measure: run.device = cuda, but nvidia-smi finds no GPU here; measure where the run will be"
        )
    room = task.launch.gpu_memory * GIB if on_gpu else machine_memory()
    for layers in range(min(_LAYERS, arch.layers), 0, -1):
        prompts = task.schedule.groups_per_rollout
        config = _config(task, arch, directory, layers, prompts, gpus)
        shape = shape_of(config)
        if needed(config, run_memory(config, shape)) > _SHARE * room:
            continue
        while prompts > 1 and _STEPS * step_times(config, shape, Workload())[0].in_turns > _SECONDS:
            prompts //= 2
            config = _config(task, arch, directory, layers, prompts, gpus)
        return config
    raise ConfigError(
        f"--measure: not even one layer of this model, {arch.hidden_size} wide, fits {room / GIB:.0f} GiB here; give --from-run"
    )


def _config(task: RunConfig, arch: Architecture, directory: Path, layers: int, prompts: int, gpus: int) -> RunConfig:
    completion = min(_COMPLETION, task.generator.max_new_tokens)
    learner, generator = task.learner, task.generator
    heads = arch.hidden_size // arch.head_dim  # some families have more of them, or fewer; a fresh Llama has so many
    tree: dict[str, Any] = {
        "run": {"name": "measure", "dir": str(directory / "run"), "device": task.run.device},
        "model": {
            "layers": layers,
            "hidden_size": arch.hidden_size,
            "ffn_size": arch.ffn_size,
            "heads": heads,
            "kv_heads": max(count for count in range(1, arch.kv_heads + 1) if heads % count == 0),
            "context_length": _PROMPT + completion,
            "tie_embeddings": arch.tie_embeddings,
        },
        "data": {"train": "builtin", "eval_prompts": 1},
        "learner": {
            "precision": learner.precision,
            "fp8": learner.fp8,
            "threads": learner.threads,
            "micro_batch_tokens": max(
                learner.micro_batch_tokens, task.algorithm.sequences_together * (_PROMPT + completion)
            ),
        },
        "generator": {
            "dtype": generator.dtype,
            "max_new_tokens": completion,
            "max_concurrent": generator.max_concurrent,
            "temperature": generator.temperature,
        },
        "algorithm": {"type": "online_dpo", "samples_per_prompt": max(2, task.algorithm.samples_per_prompt)},
        "schedule": {"mode": "sync", "steps": _STEPS, "prompts_per_step": prompts},
        "launch": {
            "gpus_per_node": min(2, gpus) or len(os.sched_getaffinity(0)),  # of CPUs what a run has here
            "gpu": task.launch.gpu,
            "gpu_memory_gib": task.launch.gpu_memory,
        },
    }
    if gpus:
        tree["weights"] = {"transport": "ipc" if gpus == 1 else "nccl"}
    return check_tree(tree)
