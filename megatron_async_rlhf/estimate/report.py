"""The estimate in words: tables of memory, whether each group of processes fits, and what to change if not."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from megatron_async_rlhf.config.reward_model_section import RewardModelSection
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.config.sections import GeneratorSection
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.estimate.fitting import (
    ACCURACY,
    FIXED_CONTROL_CPU,
    RunMemory,
    advise,
    evaluation_memory,
    needed,
    run_memory,
    shares_gpu,
)
from megatron_async_rlhf.estimate.generator_memory import GIB, GeneratorMemory
from megatron_async_rlhf.estimate.learner_memory import LearnerMemory, Work, learner_memory
from megatron_async_rlhf.estimate.machine import machine_memory
from megatron_async_rlhf.estimate.reward_memory import RewardMemory
from megatron_async_rlhf.models.architecture import Architecture

_LEARNER_COLUMNS = (
    "weights",
    "gradients",
    "optimizer",
    "reference",
    "value",
    "activations",
    "working",
    "push",
    "fixed",
)
_GENERATOR_COLUMNS = ("weights", "cache", "activations", "push", "fixed")
_REWARD_COLUMNS = ("weights", "cache", "activations", "fixed")


def describe(config: RunConfig, arch: Architecture) -> list[str]:
    """The whole estimate of memory, one line each."""
    memory = run_memory(config, arch)
    return [
        "estimate, not a measurement: memory in GiB of one process, at its peak (docs/estimate.md)",
        *_tables(memory),
        *_verdict_on_learner(config, arch, memory),
        *_verdict_on_generator(config, arch, memory.generator),
        *(_verdict_on_reward_model(config, worker) for worker in memory.rewards),
    ]


def describe_learner(config: RunConfig, arch: Architecture, work: Work) -> list[str]:
    """Of a stage that has no generators, one line each."""
    memory, room = learner_memory(config, arch, work), _room(config)
    each = config.learner.world_size // len(memory)
    fullest, together = max(rank.total for rank in memory), each * sum(rank.total + rank.host for rank in memory)
    bytes_needed, what = fullest, "the fullest rank needs"
    if config.run.device == "cpu":
        bytes_needed, what = together + FIXED_CONTROL_CPU, "all processes together need"
    fits = "fits" if bytes_needed <= room else "does not fit; lower learner.micro_batch_tokens, or use more ranks"
    return [
        "estimate, not a measurement: memory in GiB of one process, at its peak (docs/estimate.md)",
        *_learner_table(memory),
        f"{what} {_gib(bytes_needed)} of {_gib(room)} GiB: {fits}",
    ]


def describe_servers(config: RunConfig, models: Mapping[str, Architecture], contexts: Mapping[str, int]) -> list[str]:
    """Of an evaluation, which has no learner: its models are served one after the other, reward models all the time.

    Args:
        contexts: tokens of the longest sequence that each model is served with.
    """
    shapes = {name: replace(model, context_length=contexts[name]) for name, model in models.items()}
    memory = evaluation_memory(config, shapes)
    lines = [
        "estimate, not a measurement: memory in GiB of one process, at its peak (docs/estimate.md)",
        *_generator_table({f"a worker of {name}": worker for name, worker in memory.models.items()}),
        *_reward_table(memory.rewards),
    ]
    if config.run.device == "cpu":
        room, fits = _room(config), "fits" if memory.host <= _room(config) else "does not fit"
        lines.append(f"all processes together need {_gib(memory.host)} GiB of this machine's {_gib(room)} GiB: {fits}")
    for name, worker in memory.models.items():
        lines += _verdict_on_generator(config, shapes[name], worker, name)
    return [*lines, *(_verdict_on_reward_model(config, worker) for worker in memory.rewards)]


def refuse_too_large(config: RunConfig, arch: Architecture) -> None:
    """
    Raises:
        ConfigError: `launch.memory_check` is on, and on GPUs the learner is estimated to need clearly more memory than there is,
            or a server could not hold its model or a single sequence.
    """
    if not config.launch.memory_check:
        return
    memory = run_memory(config, arch)
    if config.run.device == "cuda":
        _refuse_learner(config, arch, memory)
    if not shares_gpu(config):  # or else the generator has been counted with the learner
        _refuse_server(config, "generator", config.generator, memory.generator)
    for worker, section in zip(memory.rewards, config.served_reward_models.values(), strict=True):
        _refuse_server(config, worker.key, section, worker)


def _refuse_server(
    config: RunConfig,
    key: str,
    section: GeneratorSection | RewardModelSection,
    worker: GeneratorMemory | RewardMemory,
) -> None:
    """If it is certain that vLLM would not start; the size of activations is not."""
    if worker.sequences:
        return
    if config.run.device == "cpu":
        raise ConfigError(
            f"{key}: its cache holds {worker.cache_tokens} tokens, and no sequence of the longest length with them; raise "
            f"{key}.kv_cache_gib = {section.kv_cache_gib} or {key}.tensor_parallel (--dry-run shows more)"
        )
    if worker.weights > section.gpu_memory_share * _room(config):
        raise ConfigError(
            f"{key}: its weights take {_gib(worker.weights)} GiB of each GPU, above {key}.gpu_memory_share = "
            f"{section.gpu_memory_share:g} of launch.gpu_memory_gib = {config.launch.gpu_memory_gib:g}; raise "
            f"{key}.tensor_parallel (--dry-run shows more), or set launch.memory_check = false"
        )


def _refuse_learner(config: RunConfig, arch: Architecture, memory: RunMemory) -> None:
    room = _room(config)
    largest = needed(config, memory)
    # Only beyond what the estimate may be wrong by.
    if largest > (1 + ACCURACY) * room:
        changes = advise(config, arch, room)
        helps = f"try {changes[0].change}" if changes else "use more GPUs"
        who = "learner and generator on one GPU are" if shares_gpu(config) else "the learner is"
        raise ConfigError(
            f"{who} estimated to need {_gib(largest)} GiB a GPU, above launch.gpu_memory_gib = "
            f"{config.launch.gpu_memory_gib:g}; {helps} (--dry-run shows more), or set launch.memory_check = false"
        )


def _learner_table(memory: Sequence[LearnerMemory]) -> list[str]:
    learner = Table(box=None, pad_edge=False)
    learner.add_column("learner stage")
    optional = ("value", "reference", "push")  # not all learners have them
    columns = tuple(
        name for name in _LEARNER_COLUMNS if name not in optional or any(getattr(rank, name) for rank in memory)
    )
    _add_columns(learner, columns)
    for stage, rank in enumerate(memory):
        learner.add_row(str(stage), *_row(rank, columns))
    return _lines(learner)


def _tables(memory: RunMemory) -> list[str]:
    generator = _generator_table({"a worker": memory.generator})
    return [*_learner_table(memory.learner), *generator, *_reward_table(memory.rewards)]


def _generator_table(workers: Mapping[str, GeneratorMemory]) -> list[str]:
    table = Table(box=None, pad_edge=False)
    table.add_column("generator")
    columns = tuple(
        name for name in _GENERATOR_COLUMNS if name != "push" or any(worker.push for worker in workers.values())
    )
    _add_columns(table, columns)
    for name, worker in workers.items():
        table.add_row(name, *_row(worker, columns))
    return _lines(table)


def _reward_table(workers: Sequence[RewardMemory]) -> list[str]:
    if not workers:
        return []
    table = Table(box=None, pad_edge=False)
    table.add_column("reward model")
    _add_columns(table, _REWARD_COLUMNS)
    for worker in workers:
        table.add_row(f"a worker of {worker.key}", *_row(worker, _REWARD_COLUMNS))
    return _lines(table)


def _add_columns(table: Table, names: tuple[str, ...]) -> None:
    for name in (*names, "total"):
        table.add_column(name, justify="right", no_wrap=True)


def _row(memory: LearnerMemory | GeneratorMemory | RewardMemory, names: tuple[str, ...]) -> list[str]:
    return [_gib(getattr(memory, name)) for name in (*names, "total")]


def _lines(table: Table) -> list[str]:
    text = io.StringIO()
    Console(file=text, width=110, color_system=None).print(table)
    return [line.rstrip() for line in text.getvalue().splitlines()]


def _verdict_on_learner(config: RunConfig, arch: Architecture, memory: RunMemory) -> list[str]:
    room, bytes_needed = _room(config), needed(config, memory)
    if config.run.device == "cpu":
        what = f"all processes together need {_gib(bytes_needed)} GiB of this machine's {_gib(room)} GiB"
    else:
        shared = " together with the smallest generator" if shares_gpu(config) else ""
        what = (
            f"learner: the fullest rank{shared} needs {_gib(bytes_needed)} of {_gib(room)} GiB (launch.gpu_memory_gib)"
        )
        what += f", and all ranks {_gib(memory.host)} GiB of the machine's memory"
    lines = [f"{what}: {'fits' if bytes_needed <= room else 'does not fit'}"]
    lines.append(f"  of the machine's memory, {_gib(memory.save)} GiB are for checkpoints, while one is written")
    if config.run.device == "cpu":
        lines.append("  on top comes freed memory that glibc keeps: up to 0.6 times a learner rank's in small models")
        lines.append("  and what a generator's worker keeps of oneDNN's kernels: up to 0.5 GiB after some hours")
    if bytes_needed <= room:
        return lines
    changes = advise(config, arch, room)
    lines += [f"  {'first' if i == 0 else 'then'} {a.change}: {_gib(a.needed)} GiB" for i, a in enumerate(changes)]
    if not changes or changes[-1].needed > room:
        lines.append("  that is not enough: divide the model over more GPUs, or take a smaller one")
    return lines


def _verdict_on_generator(
    config: RunConfig, arch: Architecture, worker: GeneratorMemory, name: str = "generator"
) -> list[str]:
    generator = config.generator
    holds = f"its cache holds {worker.cache_tokens} tokens, {worker.sequences} sequences of {arch.context_length}"
    if not worker.sequences:
        key = "generator.kv_cache_gib" if config.run.device == "cpu" else "generator.gpu_memory_share"
        way_out = f"raise {key} or generator.tensor_parallel"
        if shares_gpu(config):
            way_out = "lower what the learner needs of their GPU, or raise generator.gpu_memory_share"
        return [f"{name}: {holds}: does not fit; {way_out}"]
    if worker.sequences < generator.max_concurrent:
        holds += f"; generator.max_concurrent = {generator.max_concurrent} may be more than that at full length"
    if config.run.device == "cpu":
        return [f"{name}: {holds}"]
    room = _room(config)
    what = f"{name}: a worker needs {_gib(worker.total)} of {_gib(room)} GiB, {holds}"
    if worker.total > room:
        return [f"{what}: does not fit; lower generator.gpu_memory_share = {generator.gpu_memory_share:g}"]
    return [f"{what}: fits"]


def _verdict_on_reward_model(config: RunConfig, worker: RewardMemory) -> str:
    on_cpu = config.run.device == "cpu"
    what = (
        f"{worker.key}.model: its cache holds {worker.cache_tokens} tokens, {worker.sequences} sequences of "
        f"{worker.context_length}"
    )
    if not on_cpu:
        what += f"; a worker needs {_gib(worker.total)} of {_gib(_room(config))} GiB"
    if not worker.sequences:
        key = "kv_cache_gib" if on_cpu else "gpu_memory_share"
        return f"{what}: does not fit; raise {worker.key}.{key} or {worker.key}.tensor_parallel"
    if not on_cpu and worker.total > _room(config):
        return f"{what}: does not fit; lower {worker.key}.gpu_memory_share"
    return what if on_cpu else f"{what}: fits"


def _room(config: RunConfig) -> int:
    """Bytes: of one GPU, or of this machine."""
    return machine_memory() if config.run.device == "cpu" else round(config.launch.gpu_memory_gib * GIB)


def _gib(num_bytes: int) -> str:
    """Three figures, as many as may be right."""
    decimals = 1 if num_bytes >= 10 * GIB else 2 if num_bytes >= GIB / 10 else 3
    return f"{num_bytes / GIB:.{decimals}f}"
