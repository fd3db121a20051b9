"""From a task and so many devices to the best layouts: enumerate, fit, rank by formula, simulate the best.

groups of learner ranks x sizes of a generator ──> the split between both ──> fitted to memory ──> StepTimes
    ├──> a step's time says how many reward servers there must be ──> once more, with these
    └──> the best few, checked as any configuration is ──> Prediction of each ──> Plan
"""

import math
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, Literal

from msgspec import Struct
from msgspec.structs import replace
from pydantic import ValidationError

from megatron_async_rlhf.config.messages import lines_of
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import AsyncRLHFError, ConfigError
from megatron_async_rlhf.estimate.fitting import generator_worker, run_memory
from megatron_async_rlhf.estimate.generator_memory import GIB
from megatron_async_rlhf.estimate.report import refuse_too_large
from megatron_async_rlhf.estimate.speed import Lengths, Speed, typical_lengths
from megatron_async_rlhf.launch.layout import lay_out
from megatron_async_rlhf.launch.nodes import planned_nodes
from megatron_async_rlhf.models.architecture import Architecture
from megatron_async_rlhf.models.layout_rules import check_layouts
from megatron_async_rlhf.plan.analytic import (
    MOST_CONCURRENT,
    ROLLOUTS_AHEAD,
    StepTimes,
    Workload,
    rollouts_under_way,
    samples_of_a_replica,
    step_times,
)
from megatron_async_rlhf.plan.layouts import Group, fitting, generator_sizes, learner_groups, least_memory, with_keys
from megatron_async_rlhf.plan.scoring import longest_scoring_s, with_reward_servers
from megatron_async_rlhf.simulate.prediction import IN_TURNS, Prediction, estimated_scenario, predict, sized
from megatron_async_rlhf.simulate.scenario import Scenario

Kind = Literal["one_step", "bounded", "sync"]
KINDS: tuple[Kind, ...] = ("one_step", "bounded", "sync")
_SPLITS = 24  # that are tried for each pair of sizes: all, or so many spread evenly
_LEAST_SIMULATED = 3  # layouts of each kind: the first by formula is not always the fastest
_CLOSE = 0.1  # numbers of reward servers that are nearly the same
_ROUNDS = 2  # in which the number of reward servers and the best step with them follow from each other
_LATER = 4  # rollouts that are simulated beside those that begin together, and as many again
_SIMULATED = 128  # completions of a rollout; of a larger one a part is, which changes a step by about one percent


class Candidate(Struct, frozen=True, kw_only=True):
    """A layout that fits, with its times by formula.

    Attributes:
        scoring: seconds of a step in which reward models score it.
    """

    config: RunConfig
    times: StepTimes
    speed: Speed
    scoring: float

    def step_s(self, kind: Kind) -> float:
        return _scored_s(kind, self._alone_s(kind), self.times, self.scoring)

    def hiding_s(self, kind: Kind) -> float:
        """Of a step, as long as scores may take without being waited for."""
        return _hiding_s(kind, self._alone_s(kind), self.times)

    def _alone_s(self, kind: Kind) -> float:
        """If scores took no time."""
        times = self.times
        return {"one_step": times.one_step, "bounded": times.bounded, "sync": times.in_turns}[kind]


class Plan(Struct, frozen=True, kw_only=True):
    """A layout that was simulated.

    Attributes:
        kind: of schedule.
        scoring: as of a candidate.
        learner_memory, generator_memory: bytes of the fullest rank and of a worker.
    """

    kind: Kind
    config: RunConfig
    times: StepTimes
    speed: Speed
    scoring: float
    prediction: Prediction
    learner_memory: int
    generator_memory: int


def find_plans(config: RunConfig, arch: Architecture, *, best: int, workload: Workload = Workload()) -> list[Plan]:
    """The `best` of each kind of schedule that the algorithm allows, the fastest first.

    Args:
        config: the task, and `launch`: how many machines with how many devices.

    Raises:
        ConfigError: nothing fits, with the arithmetic and the smallest change that would; or what fits is refused, and why.
    """
    if config.weights.transport == "ipc":
        raise ConfigError(
            "weights.transport = ipc: learner and generator share one GPU, so that there is nothing to divide; to plan for "
            "several GPUs set weights.transport = nccl"
        )
    candidates = list(_candidates(config, arch, workload))
    if not candidates:
        raise ConfigError(_nothing_fits(config, arch))
    lengths = workload.lengths or typical_lengths(config, arch)
    tried = {config.reward_workers: candidates}
    plans: list[Plan] = []
    refused: ValueError | AsyncRLHFError | None = None
    for kind in KINDS:
        best_s = min(candidate.hiding_s(kind) for candidate in candidates)
        for _ in range(_ROUNDS if config.served_reward_models else 0):
            served = with_reward_servers(config, lengths, best_s, devices_of(config))
            if any(abs(served.reward_workers - tested) <= _CLOSE * tested for tested in tried):
                break
            tried[served.reward_workers] = found = list(_candidates(served, arch, workload))
            if not found:
                break
            best_s = min(found, key=lambda candidate: candidate.step_s(kind)).hiding_s(kind)
        simulated: list[Plan] = []
        for candidate in sorted(chain(*tried.values()), key=lambda candidate: candidate.step_s(kind)):
            try:
                simulated.append(_simulated(candidate, arch, kind, workload))
            except (ValueError, AsyncRLHFError) as error:
                refused = error
            if len(simulated) == max(best, _LEAST_SIMULATED):
                break
        plans += sorted(simulated, key=step_seconds)[:best]
    if not plans:
        reason = lines_of(refused)[0] if isinstance(refused, ValidationError) else refused
        raise ConfigError(f"no layout that fits is allowed; of the last one: {reason}")
    return plans


def step_seconds(plan: Plan) -> float:
    """Once the run is under way."""
    return _scored_s(plan.kind, plan.prediction.schedule.step_s, plan.times, plan.scoring)


def _scored_s(kind: Kind, step_s: float, times: StepTimes, scoring: float) -> float:
    """A step that also waits for reward models, which score while completions end, where they are the slowest of all."""
    return step_s + max(0.0, scoring - _hiding_s(kind, step_s, times))


def _hiding_s(kind: Kind, step_s: float, times: StepTimes) -> float:
    return times.generate + times.tail if kind == "sync" else step_s


def fastest(plans: Sequence[Plan]) -> Plan:
    """Of all kinds."""
    return min(plans, key=step_seconds)


def _candidates(config: RunConfig, arch: Architecture, workload: Workload) -> Iterator[Candidate]:
    """The best splits of each pair of sizes, one for each kind of schedule."""
    devices, on_machine = devices_of(config), config.launch.gpus_per_node
    free = devices - config.reward_workers
    scoring = longest_scoring_s(config, workload.lengths or typical_lengths(config, arch))
    for workers in generator_sizes(arch, free, on_machine):
        for group in learner_groups(arch, free - workers, on_machine):
            splits = [
                candidate
                for copies in _copies(config, group, workers, free)
                if (candidate := _candidate(config, arch, group, copies, workers, free, workload, scoring)) is not None
            ]
            chosen = {id(best): best for kind in KINDS if (best := _fastest(splits, kind)) is not None}
            yield from chosen.values()


def _fastest(candidates: Sequence[Candidate], kind: Kind) -> Candidate | None:
    return min(candidates, key=lambda candidate: candidate.step_s(kind), default=None)


def devices_of(config: RunConfig) -> int:
    """GPUs, or cores."""
    return config.launch.nodes * config.launch.gpus_per_node


def _copies(config: RunConfig, group: Group, workers: int, free: int) -> list[int]:
    """Data-parallel copies to try: none without a sequence in a step."""
    sequences = config.algorithm.trained_samples * config.schedule.prompts_per_step
    most = min((free - workers) // group.ranks, sequences // config.algorithm.sequences_together)
    if most <= _SPLITS:
        return list(range(1, most + 1))
    return sorted({1 + round(i * (most - 1) / (_SPLITS - 1)) for i in range(_SPLITS)})


def _candidate(
    config: RunConfig,
    arch: Architecture,
    group: Group,
    copies: int,
    workers: int,
    free: int,
    workload: Workload,
    scoring: float,
) -> Candidate | None:
    replicas = (free - group.ranks * copies) // workers
    groups = config.schedule.groups_per_rollout
    replicas = min(replicas, groups)  # the samples of a prompt are on one
    several = copies * group.context > 1
    learner = {
        "tensor_parallel": group.tensor,
        "pipeline_parallel": group.pipeline,
        "context_parallel": group.context,
        "ranks": group.ranks * copies,
        "virtual_stages": 1,
        "sequence_parallel": group.tensor > 1,
        "distributed_optimizer": several,
        "overlap_grad_reduce": several,
        "overlap_param_gather": False,
        "optimizer_offload": 0.0,
        "reference": "resident",
    }
    generator = {
        "tensor_parallel": workers,
        "replicas": replicas,
        "max_concurrent": max(1, min(MOST_CONCURRENT, -(-groups // replicas) * config.algorithm.samples_per_prompt)),
    }
    fits = fitting(with_keys(with_keys(config, "learner", learner), "generator", generator), arch)
    timed = ((changed, *step_times(changed, arch, workload)) for changed in fits)
    candidates = [
        Candidate(config=changed, times=times, speed=speed, scoring=scoring) for changed, times, speed in timed
    ]
    return min(candidates, key=lambda candidate: candidate.times.train, default=None)


def _simulated(candidate: Candidate, arch: Architecture, kind: Kind, workload: Workload) -> Plan:
    """
    Raises:
        ValueError, AsyncRLHFError: some rule forbids the configuration after all.
    """
    changed = with_keys(candidate.config, "schedule", schedule_keys(kind, candidate.config))
    if kind == "bounded":
        places = _places(changed, arch, workload.lengths or typical_lengths(changed, arch))
        changed = with_keys(changed, "generator", {"max_concurrent": places})
    config = RunConfig.model_validate(changed.model_dump())
    check_layouts(config, arch)
    lay_out(config, planned_nodes(config), config.generator.replicas)
    refuse_too_large(config, arch)
    scenario, speed = estimated_scenario(config, arch, workload.lengths, workload.factors, workload.completions)
    enough = _LATER + 2 * rollouts_under_way(config) if kind == "bounded" else 1
    prediction = predict(*_scaled_down(sized(config, rollouts=enough), scenario))
    memory = run_memory(config, arch)
    return Plan(
        kind=kind,
        config=config,
        times=candidate.times,
        speed=speed,
        scoring=candidate.scoring,
        prediction=prediction,
        learner_memory=memory.largest_rank,
        generator_memory=memory.generator.total,
    )


def _places(config: RunConfig, arch: Architecture, lengths: Lengths) -> int:
    """Of a generator that is kept full with the completions of several rollouts, as far as its cache holds them."""
    held = int(generator_worker(config, arch).cache_tokens / sum(lengths))
    return max(1, min(MOST_CONCURRENT, math.ceil(rollouts_under_way(config) * samples_of_a_replica(config)), held))


def schedule_keys(kind: Kind, config: RunConfig) -> dict[str, Any]:
    """What makes the task's schedule one of this kind."""
    schedule = config.schedule
    rollout = schedule.updates_per_rollout
    if kind == "sync":
        return IN_TURNS
    if kind == "one_step":
        return IN_TURNS | {"mode": "async", "max_staleness": rollout}
    if schedule.mode == "async" and schedule.generation == "streaming":
        return {}
    return {
        "mode": "async",
        "generation": "streaming",
        "in_flight_updates": "recompute",
        "max_staleness": max(schedule.staleness_bound or 0, ROLLOUTS_AHEAD * rollout),
    }


def _scaled_down(config: RunConfig, scenario: Scenario) -> tuple[RunConfig, Scenario]:
    """A part of the generators with its part of every rollout, where a whole one takes long to simulate: each generator has as
    much to do, and a step of the learner takes as long."""
    prompts, replicas = config.schedule.prompts_per_step, config.generator.replicas
    rollout = config.completions_per_rollout
    kept = max(1, round(replicas * _SIMULATED / rollout))
    if rollout <= _SIMULATED or kept >= replicas:
        return config, scenario
    part = max(1, round(prompts * kept / replicas))
    speeds = replace(scenario.speeds, train_token_s=scenario.speeds.train_token_s * prompts / part)
    smaller = with_keys(with_keys(config, "schedule", {"prompts_per_step": part}), "generator", {"replicas": kept})
    return smaller, replace(scenario, generators=kept, speeds=speeds)


def _nothing_fits(config: RunConfig, arch: Architecture) -> str:
    """The arithmetic, and what would do."""
    devices, on_machine = devices_of(config), config.launch.gpus_per_node
    room, billions = config.launch.gpu_memory, arch.num_parameters / 1e9
    smallest: tuple[int, Group] | None = None
    for group in learner_groups(arch, max(1, devices - config.reward_workers - 1), on_machine):
        learner = {
            "tensor_parallel": group.tensor,
            "pipeline_parallel": group.pipeline,
            "context_parallel": group.context,
            "ranks": group.ranks,
            "sequence_parallel": group.tensor > 1,
        }
        least = least_memory(with_keys(config, "learner", learner), arch)
        if smallest is None or least < smallest[0]:
            smallest = least, group
    what = f"nothing fits: {billions:.1f} billion parameters on {devices} devices of {room:g} GiB"
    if smallest is None:
        return f"{what}: no division of the model is allowed on so few devices; use more (launch.nodes, launch.gpus_per_node)"
    least, group = smallest
    return (
        f"{what}: divided by tensor_parallel = {group.tensor} and pipeline_parallel = {group.pipeline}, with layers computed "
        f"again and the reference in host memory, a learner rank still needs {least / GIB:.1f} GiB, and generators need "
        f"their own devices; {_way_out(config, arch)}"
    )


def _way_out(config: RunConfig, arch: Architecture) -> str:
    """The least change that makes something fit: more machines, twice as many each time."""
    nodes = config.launch.nodes
    for _ in range(8):
        nodes *= 2
        larger = with_keys(config, "launch", {"nodes": nodes})
        if next(_candidates(larger, arch, Workload()), None) is not None:
            return f"it fits launch.nodes = {nodes} ({devices_of(larger)} devices)"
    return "take a smaller model, or devices with more memory"
