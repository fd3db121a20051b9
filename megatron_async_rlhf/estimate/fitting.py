"""Does a run fit, and if not, which change of its config helps, tried out in the order of what it costs in speed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.estimate.generator_memory import GIB, CacheBudget, GeneratorMemory, generator_memory
from megatron_async_rlhf.estimate.learner_memory import FIXED_CUDA, MIB, LearnerMemory, learner_memory
from megatron_async_rlhf.estimate.reward_memory import RewardMemory, reward_memory
from megatron_async_rlhf.estimate.save_memory import save_memory
from megatron_async_rlhf.models.architecture import Architecture
from megatron_async_rlhf.models.layout_rules import check_layouts

ACCURACY = 0.15  # what the estimate may be wrong by (docs/estimate.md)
# Processes of a run on a CPU without model and data: proportional set sizes (`smaps_rollup`) of a run of
# examples/quickstart.yaml, whose model is below 4 MB.
FIXED_WORKER_CPU = 450 * MIB
FIXED_SERVER_CPU = 840 * MIB  # a replica's API server and engine core
FIXED_CONTROL_CPU = 110 * MIB  # controller and supervisor


@dataclass(frozen=True, kw_only=True)
class MemoryChange:
    """A change of the config, and what is needed after it and all changes before, in bytes."""

    change: str
    needed: int


@dataclass(frozen=True, kw_only=True)
class RunMemory:
    """What all processes of a run need.

    Attributes:
        learner: a rank of each pipeline stage.
        generator: a worker.
        rewards: a worker of each reward model that the run serves.
        host: all processes on a CPU together; beside GPUs, what the learner ranks keep in the machine's memory.
        save: the part of it that is there while a checkpoint is written.
    """

    learner: list[LearnerMemory]
    generator: GeneratorMemory
    rewards: list[RewardMemory]
    host: int
    save: int

    @property
    def largest_rank(self) -> int:
        return max(rank.total for rank in self.learner)


def run_memory(config: RunConfig, arch: Architecture) -> RunMemory:
    """Of every group of processes."""
    on_cpu = config.run.device == "cpu"
    learner = learner_memory(config, arch)
    generator = _generator(config, arch, learner)
    rewards = reward_memory(config, fixed=_fixed(config))
    ranks_of_stage = config.learner.world_size // len(learner)
    save = config.learner.tensor_parallel * sum(save_memory(config, arch))
    host = ranks_of_stage * sum(rank.host for rank in learner) + save
    if on_cpu:
        workers = config.generator.workers
        host += ranks_of_stage * sum(rank.total for rank in learner) + workers * generator.total
        host += config.generator.replicas * FIXED_SERVER_CPU + FIXED_CONTROL_CPU + _reward_servers(config, rewards)
    return RunMemory(learner=learner, generator=generator, rewards=rewards, host=host, save=save)


def generator_worker(config: RunConfig, arch: Architecture) -> GeneratorMemory:
    """The part of `run_memory` that a generator's speed follows from."""
    return _generator(config, arch, learner_memory(config, arch) if shares_gpu(config) else [])


def _generator(config: RunConfig, arch: Architecture, learner: Sequence[LearnerMemory]) -> GeneratorMemory:
    beside = round((1 + ACCURACY) * max(rank.total for rank in learner)) if shares_gpu(config) else 0
    return generator_memory(config, arch, fixed=_fixed(config), beside=beside)


def _fixed(config: RunConfig) -> int:
    return FIXED_WORKER_CPU if config.run.device == "cpu" else FIXED_CUDA


@dataclass(frozen=True, kw_only=True)
class EvaluationMemory:
    """What all processes of an evaluation need.

    Attributes:
        models: a worker of each model; one model is served at a time.
        rewards: a worker of each reward model that is served.
        host: on a CPU, all processes together while the largest model is served.
    """

    models: dict[str, GeneratorMemory]
    rewards: list[RewardMemory]
    host: int


def evaluation_memory(config: RunConfig, models: Mapping[str, Architecture]) -> EvaluationMemory:
    """As `run_memory`, of models that are loaded whole and get no pushes."""
    fixed = _fixed(config)
    workers = {name: generator_memory(config, model, fixed=fixed, loads_weights=True) for name, model in models.items()}
    rewards, generator = reward_memory(config, fixed=fixed), config.generator
    host = generator.workers * max(worker.total for worker in workers.values())
    host += generator.replicas * FIXED_SERVER_CPU + FIXED_CONTROL_CPU + _reward_servers(config, rewards)
    return EvaluationMemory(models=workers, rewards=rewards, host=host)


def _reward_servers(config: RunConfig, rewards: Sequence[RewardMemory]) -> int:
    """All of them together, on a CPU."""
    return sum(
        section.replicas * (section.tensor_parallel * worker.total + FIXED_SERVER_CPU)
        for section, worker in zip(config.served_reward_models.values(), rewards, strict=True)
    )


def needed(config: RunConfig, memory: RunMemory) -> int:
    """Bytes that must fit: on the fullest GPU with a learner rank, or in the machine's memory on a CPU."""
    if config.run.device == "cpu":
        return memory.host
    return memory.largest_rank + (memory.generator.least if shares_gpu(config) else 0)


def shares_gpu(config: RunConfig) -> bool:
    """Whether a learner rank and a generator's worker are on one GPU."""
    return config.run.device == "cuda" and config.weights.transport == "ipc"


def generator_budget(config: RunConfig, arch: Architecture) -> CacheBudget | None:
    """What a generator is given on a CPU, or of a GPU that it shares with a learner rank; None where it has a GPU for
    itself."""
    if config.run.device == "cpu":
        return CacheBudget(share=0.0, cache=generator_memory(config, arch, fixed=FIXED_WORKER_CPU).cache)
    if not shares_gpu(config):
        return None
    worker = run_memory(config, arch).generator
    cache = max(worker.cache, worker.smallest_cache)
    room = config.launch.gpu_memory * GIB
    share = (worker.weights + worker.activations + cache) / room
    return CacheBudget(share=min(round(share, 3) or 0.001, config.generator.gpu_memory_share), cache=cache)


def advise(config: RunConfig, arch: Architecture, room: int) -> list[MemoryChange]:
    """Changes of the learner until what is needed fits `room` bytes, cheapest in speed first, each on top of those
    before; changes that save nothing are left out. The last may still not be enough."""
    changes: list[MemoryChange] = []
    lowest = needed(config, run_memory(config, arch))
    for change, keys in _changes(config, arch):
        changed = _with_learner(config, arch, keys)
        if changed is None or (bytes_needed := needed(changed, run_memory(changed, arch))) >= lowest:
            continue
        config, lowest = changed, bytes_needed
        if changes and changes[-1].change.split(" = ")[0] == change.split(" = ")[0]:
            changes.pop()  # more of the same
        changes.append(MemoryChange(change=change, needed=lowest))
        if lowest <= room:
            break
    return changes


def _changes(config: RunConfig, arch: Architecture) -> Iterator[tuple[str, dict]]:
    learner, on_gpu = config.learner, config.run.device == "cuda"
    if learner.tensor_parallel > 1:
        yield "learner.sequence_parallel = true", {"sequence_parallel": True}
    if learner.copies > 1:
        yield "learner.distributed_optimizer = true", {"distributed_optimizer": True}
    if on_gpu and learner.precision == "fp32":
        yield "learner.precision = bf16", {"precision": "bf16"}
    # What the loss needs together; below 1024, matrix products get inefficient.
    smallest = max(config.algorithm.sequences_together * arch.context_length, 1024)
    shorter = {max(smallest, learner.micro_batch_tokens // part) for part in (2, 4, 16)} | {smallest}
    for tokens in sorted(shorter, reverse=True):
        yield f"learner.micro_batch_tokens = {tokens}", {"micro_batch_tokens": tokens}
    yield "learner.recompute = full", {"recompute": "full"}
    if on_gpu:
        yield "learner.reference = swapped", {"reference": "swapped"}
        free = config.launch.nodes * config.launch.gpus_per_node - config.generator.workers - config.reward_workers
        for tensor in (2, 4, 8):
            ranks = tensor * learner.pipeline_parallel * learner.context_parallel
            if tensor > learner.tensor_parallel and ranks <= free:
                keys = {"tensor_parallel": tensor, "ranks": ranks, "sequence_parallel": True}
                if ranks == tensor * learner.pipeline_parallel:  # one copy is left
                    keys |= {
                        "distributed_optimizer": False,
                        "overlap_grad_reduce": False,
                        "overlap_param_gather": False,
                    }
                change = (
                    f"learner.tensor_parallel = {tensor}, learner.ranks = {ranks}, learner.sequence_parallel = true"
                )
                yield change, keys
        yield "learner.optimizer_offload = 1.0", {"optimizer_offload": 1.0}


def _with_learner(config: RunConfig, arch: Architecture, keys: dict) -> RunConfig | None:
    """`config` with other keys of the learner, or nothing if a rule forbids it."""
    tree = config.model_dump()
    tree["learner"] |= keys
    try:
        changed = RunConfig.model_validate(tree)
        check_layouts(changed, arch)
    except (ValidationError, ConfigError):
        return None
    return changed
