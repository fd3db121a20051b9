"""The time of a step by formula, for ranking hundreds of layouts; the best of them are simulated (`simulate.prediction`)."""

import math
from statistics import NormalDist

from msgspec import Struct

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.estimate.fitting import generator_worker
from megatron_async_rlhf.estimate.speed import Factors, Speed, corrected, estimate_speed
from megatron_async_rlhf.estimate.speed import Lengths as MeanLengths
from megatron_async_rlhf.models.architecture import Architecture
from megatron_async_rlhf.simulate.lengths import Lengths
from megatron_async_rlhf.simulate.prediction import SIGMA

ROLLOUTS_AHEAD = 4  # of generators that are kept full, unless the task says how many
MOST_CONCURRENT = 1024  # sequences of a generator


class Workload(Struct, frozen=True, kw_only=True):
    """What is not in a configuration.

    Attributes:
        lengths: of prompts and completions, on average; None: half of what they may be.
        completions: how long they are, not only on average; None: lognormal.
        factors: that correct the estimated speeds.
    """

    lengths: MeanLengths | None = None
    completions: Lengths | None = None
    factors: Factors = Factors()


class StepTimes(Struct, frozen=True, kw_only=True):
    """Seconds of an optimizer step, each side alone.

    Attributes:
        train: with all that belongs to a step.
        generate: with the sequences of one rollout at once; `full`: of several, with caches that pushes make stale.
        tail: until the longest completion is there, when no others take the places of those that are.
        push: the generators' pause, of a step's share.
    """

    train: float
    generate: float
    full: float
    tail: float
    push: float
    contention: float

    @property
    def one_step(self) -> float:
        """One rollout ahead, which is waited for to its longest completion."""
        return self._longer(self.generate + self.tail + self.push)

    @property
    def bounded(self) -> float:
        """Generators always full."""
        return self._longer(self.full + self.push)

    @property
    def in_turns(self) -> float:
        return self.train + self.generate + self.tail + self.push

    def _longer(self, generate: float) -> float:
        longer, shorter = max(self.train, generate), min(self.train, generate)
        return longer + (self.contention - 1) * shorter


def step_times(config: RunConfig, arch: Architecture, workload: Workload) -> tuple[StepTimes, Speed]:
    """Of a configuration that fits."""
    worker = generator_worker(config, arch)
    speed = corrected(estimate_speed(config, arch, worker, workload.lengths), workload.factors)
    schedule = config.schedule
    rollout = config.completions_per_rollout
    each = samples_of_a_replica(config)
    held = worker.cache_tokens / (speed.prompt + speed.completion)
    full = max(1.0, min(rollouts_under_way(config) * each, MOST_CONCURRENT, held))
    # After a push the caches of all that are under way are made again, unless the task's own schedule keeps them.
    context = speed.prompt - speed.shared_prompt * (1 - 1 / config.algorithm.samples_per_prompt) + speed.completion / 2
    keeps = schedule.generation == "streaming" and schedule.in_flight_updates == "keep"
    again_s = 0.0 if keeps else full * context * speed.prompt_token_s
    longest = min(config.generator.max_new_tokens, speed.completion * _longest_share(rollout))
    updates = schedule.updates_per_rollout
    return (
        StepTimes(
            train=speed.learner.total,
            generate=_decoding_s(speed, each, speed.at_once) / updates,
            full=(_decoding_s(speed, each, full) + again_s) / updates,
            tail=(longest - speed.completion) * speed.token_s / updates,  # with few sequences at last
            push=speed.push_s / updates,
            contention=speed.contention,
        ),
        speed,
    )


def rollouts_under_way(config: RunConfig) -> int:
    """Of generators that are kept full: the one that comes next, and those that may be ahead of it."""
    schedule = config.schedule
    is_own = schedule.mode == "async" and schedule.generation == "streaming"
    ahead = ROLLOUTS_AHEAD
    if is_own and schedule.staleness_bound is not None:
        ahead = schedule.staleness_bound // schedule.updates_per_rollout
    return ahead + 1


def samples_of_a_replica(config: RunConfig) -> float:
    """Of a rollout."""
    return config.completions_per_rollout / config.generator.replicas


def _decoding_s(speed: Speed, samples: float, at_once: float) -> float:
    """Of so many completions, so many at once."""
    return samples * speed.completion * (speed.token_s / at_once + speed.sequence_s)


def _longest_share(samples: float) -> float:
    """The longest of so many lognormal lengths, over their mean."""
    if samples <= 1:
        return 1.0
    deviations = NormalDist().inv_cdf((samples - 0.375) / (samples + 0.25))  # Blom 1958, of a normal one's largest
    return math.exp(SIGMA * deviations - SIGMA**2 / 2)
