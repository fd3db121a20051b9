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
_OPTIONAL = ("value", "reference", "push")  # not all runs have them
_HEADING = "estimate, not a measurement: memory in GiB of one process, at its peak (docs/estimate.md)"


def describe(config: RunConfig, arch: Architecture) -> list[str]:
    """The whole estimate of memory, one line each."""
    memory = run_memory(config, arch)
    return [
        _HEADING,
        *_tables(memory),
        *_verdict_on_learner(config, arch, memory),
        _verdict_on_generator(config, arch, memory.generator),
        *_verdicts_on_rewards(config, memory.rewards),
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
        _HEADING,
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
        _HEADING,
        *_table("generator", {f"a worker of {name}": each for name, each in memory.models.items()}, _GENERATOR_COLUMNS),
        *_reward_table(memory.rewards),
    ]
    if config.run.device == "cpu":
        room, fits = _room(config), "fits" if memory.host <= _room(config) else "does not fit"
        lines.append(f"all processes together need {_gib(memory.host)} GiB of this machine's {_gib(room)} GiB: {fits}")
    lines += [_verdict_on_generator(config, shapes[name], worker, name) for name, worker in memory.models.items()]
    return [*lines, *_verdicts_on_rewards(config, memory.rewards)]


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
            f"{section.gpu_memory_share:g} of launch.gpu_memory_gib = {config.launch.gpu_memory:g}; raise "
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
            f"{config.launch.gpu_memory:g}; {helps} (--dry-run shows more), or set launch.memory_check = false"
        )


def _tables(memory: RunMemory) -> list[str]:
    return [
        *_learner_table(memory.learner),
        *_table("generator", {"a worker": memory.generator}, _GENERATOR_COLUMNS),
        *_reward_table(memory.rewards),
    ]


def _learner_table(memory: Sequence[LearnerMemory]) -> list[str]:
    return _table("learner stage", {str(stage): rank for stage, rank in enumerate(memory)}, _LEARNER_COLUMNS)


def _reward_table(workers: Sequence[RewardMemory]) -> list[str]:
    return _table("reward model", {f"a worker of {worker.key}": worker for worker in workers}, _REWARD_COLUMNS)


def _table(
    title: str, rows: Mapping[str, LearnerMemory | GeneratorMemory | RewardMemory], names: tuple[str, ...]
) -> list[str]:
    """A line for each row, and a heading; none without rows."""
    if not rows:
        return []
    has = [name for name in names if name not in _OPTIONAL or any(getattr(row, name) for row in rows.values())]
    table = Table(box=None, pad_edge=False)
    table.add_column(title)
    for name in (*has, "total"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, row in rows.items():
        table.add_row(name, *(_gib(getattr(row, column)) for column in (*has, "total")))
    text = io.StringIO()
    Console(file=text, width=110, color_system=None).print(table)
    return [line.rstrip() for line in text.getvalue().splitlines()]


def _verdict_on_learner(config: RunConfig, arch: Architecture, memory: RunMemory) -> list[str]:
    room, bytes_needed = _room(config), needed(config, memory)
    whose = "the machine's memory" if config.launch.nodes == 1 else "the memory of all machines together"
    if config.run.device == "cpu":
        what = f"all processes together need {_gib(bytes_needed)} GiB of this machine's {_gib(room)} GiB"
    else:
        shared = " together with the smallest generator" if shares_gpu(config) else ""
        what = (
            f"learner: the fullest rank{shared} needs {_gib(bytes_needed)} of {_gib(room)} GiB (launch.gpu_memory_gib)"
        )
        what += f", and all ranks {_gib(memory.host)} GiB of {whose}"
    lines = [f"{what}: {'fits' if bytes_needed <= room else 'does not fit'}"]
    lines.append(f"  of {whose}, {_gib(memory.save)} GiB are for checkpoints, while one is written")
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
) -> str:
    return _verdict_on_server(config, name, "generator", config.generator, worker, arch.context_length)


def _verdicts_on_rewards(config: RunConfig, workers: Sequence[RewardMemory]) -> list[str]:
    sections = config.served_reward_models.values()
    return [
        _verdict_on_server(config, f"{worker.key}.model", worker.key, section, worker, worker.context_length)
        for worker, section in zip(workers, sections, strict=True)
    ]


def _verdict_on_server(
    config: RunConfig,
    name: str,
    key: str,
    section: GeneratorSection | RewardModelSection,
    worker: GeneratorMemory | RewardMemory,
    context: int,
) -> str:
    holds = f"its cache holds {worker.cache_tokens} tokens, {worker.sequences} sequences of {context}"
    if not worker.sequences:
        way_out = f"raise {key}.{_memory_key(config)} or {key}.tensor_parallel"
        if isinstance(worker, GeneratorMemory) and shares_gpu(config):
            way_out = "lower what the learner needs of their GPU, or raise generator.gpu_memory_share"
        return f"{name}: {holds}: does not fit; {way_out}"
    if worker.sequences < (section.max_concurrent or 1):
        holds += f"; {key}.max_concurrent = {section.max_concurrent} may be more than that at full length"
    if config.run.device == "cpu":
        return f"{name}: {holds}"
    room = _room(config)
    what = f"{name}: a worker needs {_gib(worker.total)} of {_gib(room)} GiB, {holds}"
    if worker.total > room:
        return f"{what}: does not fit; lower {key}.gpu_memory_share = {section.gpu_memory_share:g}"
    return f"{what}: fits"


def _memory_key(config: RunConfig) -> str:
    """Of a server's section: what its cache follows from."""
    return "kv_cache_gib" if config.run.device == "cpu" else "gpu_memory_share"


def _room(config: RunConfig) -> int:
    """Bytes: of one GPU, or of this machine."""
    return machine_memory() if config.run.device == "cpu" else round(config.launch.gpu_memory * GIB)


def _gib(num_bytes: int) -> str:
    """Three figures, as many as may be right."""
    decimals = 1 if num_bytes >= 10 * GIB else 2 if num_bytes >= GIB / 10 else 3
    return f"{num_bytes / GIB:.{decimals}f}"
