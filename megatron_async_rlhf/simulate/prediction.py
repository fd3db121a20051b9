"""A configuration's schedule beside the synchronous one, from one set of speeds: what `simulate` and a dry run both say.

estimate.speed, or a run that was ──> Scenario ──> both schedules in virtual time ──> Prediction
"""

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import AsyncRLHFError, ConfigError
from megatron_async_rlhf.estimate.fitting import run_memory
from megatron_async_rlhf.estimate.machines import Machine
from megatron_async_rlhf.estimate.speed import Factors, Speed, corrected, estimate_speed
from megatron_async_rlhf.estimate.speed import Lengths as MeanLengths
from megatron_async_rlhf.jobs.inputs import make_model_template, resolve_architecture
from megatron_async_rlhf.models.architecture import Architecture
from megatron_async_rlhf.simulate.lengths import Lengths, LognormalLengths
from megatron_async_rlhf.simulate.scenario import Scenario, Speeds
from megatron_async_rlhf.simulate.simulation import Outcome, simulate

SIGMA = 0.6  # of the logarithm of completion lengths
# A prediction simulates so many completions, or the rollouts that may take up to so many: a second or two.
_SAMPLES, _ROLLOUTS, _MOST_SAMPLES = 2000, 9, 16000
_MOST_IN_A_ROLLOUT = 20000  # completions for which a dry run waits

# The run whose prediction was compared, on two cores: sync 130 s, async 82 s of 110 steps each, means of three seeds.
# Predicted is what comes out for it here (tests/simulate/test_prediction.py).
MEASURED = ("examples/quickstart.yaml on two CPU cores", 1.59)
PREDICTED = 1.71

# Keys of the schedule that make any synchronous.
IN_TURNS = {
    "mode": "sync",
    "generation": "batch",
    "in_flight_updates": "none",
    "order": "fifo",
    "window": None,
    "max_groups": None,
    "straggler_s": None,
    "max_staleness": 0,
}


class Prediction(Struct, frozen=True, kw_only=True):
    """The same sizes and machines under both schedules.

    Attributes:
        in_turns: simulates the synchronous one at its first call, for a planner needs that of few layouts that it tries.
    """

    scenario: Scenario
    schedule: Outcome
    in_turns: Callable[[], Outcome]

    @property
    def synchronous(self) -> Outcome:
        """
        Raises:
            InvariantError, DeadlockError, StaleSampleError: see `predict`.
        """
        return self.in_turns()

    @property
    def speedup(self) -> float:
        """How many times as fast a step is, once the run is under way."""
        return self.synchronous.step_s / self.schedule.step_s

    @property
    def verdict(self) -> str:
        """One line, the same from every command: the ratio, and which side works longer on a step."""
        totals = self.synchronous.totals
        busier = "the generators have" if totals.generate_busy_s >= totals.train_busy_s else "the learner has"
        return f"{self.speedup:.2f} times as fast as the synchronous schedule on the same machines; {busier} the most to do"


def synchronous(config: RunConfig) -> RunConfig:
    """The same sizes and machines, taking turns: the split with idling that the paper compares with."""
    tree = config.model_dump()
    return RunConfig.model_validate(tree | {"schedule": tree["schedule"] | IN_TURNS})


def predict(config: RunConfig, scenario: Scenario, trace: Path | None = None) -> Prediction:
    """Simulate both; the sides only slow each other down where they work at once.

    Raises:
        InvariantError, DeadlockError, StaleSampleError: a promise of the schedule is broken.
    """
    turns, alone = synchronous(config), scenario
    in_turns = cache(lambda: simulate(turns, alone))
    if turns == config and trace is None:
        return Prediction(scenario=scenario, schedule=in_turns(), in_turns=in_turns)
    if config.schedule.staleness_bound != 0 and scenario.speeds.contention != 1:  # 1: `slowed` would change nothing
        totals = in_turns().totals
        scenario = replace(scenario, speeds=slowed(scenario.speeds, totals.generate_busy_s, totals.train_busy_s))
    return Prediction(scenario=scenario, schedule=simulate(config, scenario, trace), in_turns=in_turns)


def slowed(speeds: Speeds, generate_s: float, train_s: float) -> Speeds:
    """Where both sides work at once, if they take so long alone: the one that is done first is slowed down all the time,
    the other as long as that one works."""
    more, longer = speeds.contention - 1, max(generate_s, train_s) or 1.0
    return _scaled(speeds, generate=1 + more * train_s / longer, train=1 + more * generate_s / longer)


def alone(speeds: Speeds, generate_s: float, train_s: float) -> Speeds:
    """The inverse of `slowed`: of sides that took so long while both worked."""
    shorter, longer = sorted((generate_s, train_s))
    shortest = shorter / speeds.contention
    rest = longer - (speeds.contention - 1) * shortest
    longer_factor, shorter_factor = rest / longer if longer else 1.0, 1 / speeds.contention
    if generate_s >= train_s:
        return _scaled(speeds, generate=longer_factor, train=shorter_factor)
    return _scaled(speeds, generate=shorter_factor, train=longer_factor)


def _scaled(speeds: Speeds, *, generate: float, train: float) -> Speeds:
    return replace(
        speeds,
        token_s=speeds.token_s * generate,
        sequence_s=speeds.sequence_s * generate,
        prompt_token_s=speeds.prompt_token_s * generate,
        train_s=speeds.train_s * train,
        train_token_s=speeds.train_token_s * train,
    )


def first_steps(config: RunConfig) -> int:
    """How many of the run's steps a prediction simulates, unless it is told."""
    schedule = config.schedule
    rollout = config.completions_per_rollout
    enough = max(_SAMPLES // rollout, min(_ROLLOUTS, max(3, _MOST_SAMPLES // rollout)))
    return min(schedule.rollouts, enough) * schedule.updates_per_rollout


def shape_of(config: RunConfig) -> Architecture:
    """
    Raises:
        ConfigError: `model.hf` has no `config.json`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        make_model_template(config, Path(scratch), or_described=True)
        return resolve_architecture(config, Path(scratch))[0]


def estimated_scenario(
    config: RunConfig,
    arch: Architecture,
    lengths: MeanLengths | None = None,
    factors: Factors = Factors(),
    completions: Lengths | None = None,
    machine: Machine | None = None,
) -> tuple[Scenario, Speed]:
    """What the machines that `config` names are estimated to do with it.

    Args:
        lengths: on average; default: half of what they may be.
        factors: that correct the estimated speeds.
        completions: how long they are, not only on average; default: lognormal.
        machine: what else they are; default: `machine_of`.

    Raises:
        ConfigError: a generator has no room for a single sequence.
    """
    memory = run_memory(config, arch).generator
    if not memory.sequences:
        raise ConfigError(
            "generator: its cache holds no sequence of the whole context, so no speed can be predicted; see the estimate "
            "of train --dry-run"
        )
    speed = corrected(estimate_speed(config, arch, memory, lengths, machine), factors)
    speeds = Speeds(
        token_s=speed.token_s,
        sequence_s=speed.sequence_s,
        prompt_token_s=speed.prompt_token_s,
        train_s=speed.learner.fixed,
        train_token_s=speed.learner.per_token,
        push_s=speed.push_s,
        contention=speed.contention,
        jitter=speed.machine.jitter,
    )
    scenario = Scenario(
        generators=config.generator.replicas,
        lengths=completions or LognormalLengths(speed.completion, SIGMA, config.generator.max_new_tokens),
        speeds=speeds,
        places=max(1, int(memory.cache_tokens / (speed.prompt + speed.completion))),
        prompt_tokens=max(1, round(speed.prompt)),
        shared_prompt_tokens=int(speed.shared_prompt),
    )
    return scenario, speed


def sized(config: RunConfig, *, rollouts: int = 1) -> RunConfig:
    """With the steps that a prediction simulates, of so many rollouts at least if the run has them."""
    tree, schedule = config.model_dump(), config.schedule
    steps = max(first_steps(config), min(rollouts, schedule.rollouts) * schedule.updates_per_rollout)
    return RunConfig.model_validate(tree | {"schedule": tree["schedule"] | {"steps": steps}})


def describe(config: RunConfig, arch: Architecture) -> list[str]:
    """What a dry run says of speed."""
    try:
        scenario, speed = estimated_scenario(config, arch)
    except ConfigError:
        return []  # the estimate of memory has said so
    rollout = config.completions_per_rollout
    if rollout > _MOST_IN_A_ROLLOUT:
        return [
            f"speed: not predicted here, for a rollout has {rollout:,} completions; async-rlhf simulate takes the time"
        ]
    try:
        prediction = predict(sized(config), scenario)
        turns = prediction.synchronous
    except AsyncRLHFError as error:
        return [f"speed: not predicted, for this configuration fails when it is simulated: {error}"]
    machine = speed.machine
    lines = [
        f"speed, predicted for {machine.name} with prompts of {speed.prompt:.0f} and completions of {speed.completion:.0f} "
        f"tokens on average (half of what they may be), assuming {machine.assumed}:",
        f"  learner {speed.trained_per_s:,.0f} tokens/s, generators up to {speed.generated_per_s:,.0f} tokens/s",
        f"  a step: training {_s(turns.totals.train_busy_s / turns.totals.steps)}, generation "
        f"{_s(turns.totals.generate_busy_s / turns.totals.steps)} to its longest completion, push {_s(speed.push_s)}; "
        f"taking turns {_s(turns.step_s)}, as configured {_s(prediction.schedule.step_s)}",
    ]
    return [*lines, f"  {prediction.verdict}", f"  {known_error(config)}"]


def known_error(config: RunConfig) -> str:
    """What is known of how far such a prediction is off."""
    where, measured = MEASURED
    compared = f"{where}: predicted {PREDICTED:.2f} times, measured {measured:.2f}"
    if config.run.device == "cpu":
        return f"known error: {compared}; seconds may be off by a factor of 2, --from-run takes them from a run"
    return f"known error: no run on GPUs has been compared yet, only their speeds (docs/gpu_results.md); {compared}"


def _s(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 10 else f"{seconds:.2f} s"
