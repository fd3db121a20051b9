"""Asynchronous against each synchronous schedule, at equal samples and at equal time, and what follows.

runs of one configuration ──> figures of each schedule ──> async against a baseline, seed by seed ──> verdict
"""

from collections.abc import Callable, Sequence
from typing import Any

from msgspec import Struct

from megatron_async_rlhf.compare.estimates import Estimate, mean_of, ratio_of, transformed
from megatron_async_rlhf.compare.runs import ComparedRun, check_alike
from megatron_async_rlhf.compare.schedules import BASELINES, SCHEDULES, Schedule
from megatron_async_rlhf.errors import ConfigError

# Below this speed-up asynchronous training is not worth that its samples are older.
WORTHWHILE = 1.05


class ScheduleFigures(Struct, frozen=True, kw_only=True):
    """Means over the runs of one schedule; what no run measured is None.

    Attributes:
        step_seconds: wall clock over optimizer steps; `generate_seconds`, `train_seconds`: of a step, each side at work.
        learner_idle, generators_idle: shares of the wall clock.
        overlap: the slower side's work over the wall clock.
        push_stall: share of the wall clock in which generators stood still for new weights.
        before, after: held-out reward.
        win_rate: of the trained policy's held-out answers over those of the policy it began with.
        kl: to the reference at the end of training, nats per completion.
    """

    seeds: list[int]
    wall_seconds: Estimate
    step_seconds: Estimate
    generate_seconds: Estimate
    train_seconds: Estimate
    learner_idle: Estimate
    generators_idle: Estimate
    overlap: Estimate
    push_stall: Estimate
    startup_seconds: Estimate
    samples_per_second: Estimate
    before: Estimate | None
    after: Estimate | None
    win_rate: Estimate | None
    kl: Estimate | None


class Against(Struct, frozen=True, kw_only=True):
    """Asynchronous minus or over one baseline, seed by seed.

    Attributes:
        speedup: the baseline's wall clock over the asynchronous one; `time_saved` says the same as a share.
        speedup_limit: the baseline's wall clock over the time that its slower side was at work: no asynchronous run that generates
            and trains as much on these devices can be faster. `speedup` is this over `inflation`.
        inflation: the asynchronous wall clock over the time that the baseline's slower side was at work: 1 if it never waits, and
            takes no longer while the other side works too.
        held_out_reward, win_rate, kl: differences at the end, so at equal samples.
        reward_at_equal_samples, reward_at_equal_time: differences in training reward, over a window of steps: at the end, and
            when the faster of both was done.
    """

    seeds: list[int]
    speedup: Estimate
    time_saved: Estimate
    speedup_limit: Estimate
    inflation: Estimate
    held_out_reward: Estimate | None
    win_rate: Estimate | None
    kl: Estimate | None
    reward_at_equal_samples: Estimate
    reward_at_equal_time: Estimate

    @property
    def is_faster(self) -> bool | None:
        """By enough; None if more seeds would have to tell. The limit decides where the measured speed-up does not."""
        measured = self.speedup.is_above(WORTHWHILE)
        return False if measured is None and self.speedup_limit.is_above(WORTHWHILE) is False else measured

    @property
    def pays(self) -> bool | None:
        """Whether asynchronous training is faster by enough and no worse; None if more seeds would have to tell.

        One seed tells how much faster it is, within a few per cent, but not whether a lower reward is more than chance.
        """
        faster, reward = self.is_faster, self.held_out_reward
        if reward is None or reward.is_above(0) is not False:
            return faster
        return False if reward.seeds > 1 or faster is False else None


class Comparison(Struct, frozen=True, kw_only=True):
    """All of it; `notes` say what was left out."""

    runs: list[ComparedRun]
    schedules: dict[Schedule, ScheduleFigures]
    against: dict[Schedule, Against]
    notes: list[str]

    @property
    def pays(self) -> bool | None:
        """Against every baseline."""
        verdicts = [against.pays for against in self.against.values()]
        return False if False in verdicts else None if None in verdicts else True


def compare_runs(runs: Sequence[ComparedRun]) -> Comparison:
    """
    Raises:
        ConfigError: they are not of one configuration, or no seed has been run both ways.
    """
    if not runs:
        raise ConfigError("there are no runs to compare")
    check_alike(runs)
    by_schedule: dict[Schedule, dict[int, ComparedRun]] = {}
    for run in runs:
        of_seed = by_schedule.setdefault(run.schedule, {})
        if run.seed in of_seed:
            raise ConfigError(
                f"{of_seed[run.seed].directory} and {run.directory} are both {run.schedule} with seed {run.seed}; give one "
                "of them"
            )
        of_seed[run.seed] = run
    ours = by_schedule.get("async", {})
    notes: list[str] = []
    against: dict[Schedule, Against] = {}
    for baseline in BASELINES:
        theirs = by_schedule.get(baseline, {})
        if not theirs:
            continue
        seeds = sorted(ours.keys() & theirs.keys())
        alone = sorted(ours.keys() ^ theirs.keys())
        if alone and seeds:
            notes.append(
                f"async against {baseline}: only seeds that both have are compared, not {', '.join(map(str, alone))}"
            )
        if seeds:
            against[baseline] = _against([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds])
    if not against:
        found = "; ".join(f"{name}: seeds {sorted(of_seed)}" for name, of_seed in by_schedule.items())
        raise ConfigError(f"no seed was run both asynchronously and synchronously ({found})")
    figures = {
        name: _figures([by_schedule[name][seed] for seed in sorted(by_schedule[name])])
        for name in SCHEDULES
        if name in by_schedule
    }
    return Comparison(runs=list(runs), schedules=figures, against=against, notes=notes)


def _figures(runs: Sequence[ComparedRun]) -> ScheduleFigures:
    def mean(of: Callable[[ComparedRun], float]) -> Estimate:
        return mean_of([of(run) for run in runs])

    def known(of: Callable[[ComparedRun], float | None]) -> Estimate | None:
        values = [value for run in runs if (value := of(run)) is not None]
        return mean_of(values) if values else None

    return ScheduleFigures(
        seeds=[run.seed for run in runs],
        wall_seconds=mean(lambda run: run.wall_s),
        step_seconds=mean(lambda run: run.wall_s / run.steps),
        generate_seconds=mean(lambda run: run.generate_s / run.steps),
        train_seconds=mean(lambda run: run.train_s / run.steps),
        learner_idle=mean(lambda run: 1 - run.train_s / run.wall_s),
        generators_idle=mean(lambda run: 1 - run.generate_s / run.wall_s),
        overlap=mean(lambda run: run.overlap),
        push_stall=mean(lambda run: run.push_s / run.wall_s),
        startup_seconds=mean(lambda run: run.startup_s),
        samples_per_second=mean(lambda run: run.samples / run.wall_s),
        before=known(lambda run: run.before),
        after=known(lambda run: run.after),
        win_rate=known(lambda run: run.win_rate),
        kl=known(lambda run: run.kl_at_end),
    )


def _against(ours: Sequence[ComparedRun], theirs: Sequence[ComparedRun]) -> Against:
    pairs = list(zip(ours, theirs, strict=True))

    def difference(of: Callable[[ComparedRun], float | None]) -> Estimate | None:
        both = [(of(our), of(their)) for our, their in pairs]
        values = [our - their for our, their in both if our is not None and their is not None]
        return mean_of(values) if values else None

    speedup = ratio_of([their.wall_s / our.wall_s for our, their in pairs])
    slower = [max(their.generate_s, their.train_s) for their in theirs]
    ends = [min(our.wall_s, their.wall_s) for our, their in pairs]
    at_once = [our.reward_at(end) - their.reward_at(end) for (our, their), end in zip(pairs, ends, strict=True)]
    return Against(
        seeds=[our.seed for our in ours],
        speedup=speedup,
        time_saved=transformed(speedup, lambda ratio: 1 - 1 / ratio),
        speedup_limit=ratio_of([their.wall_s / busy for their, busy in zip(theirs, slower, strict=True)]),
        inflation=ratio_of([our.wall_s / busy for our, busy in zip(ours, slower, strict=True)]),
        held_out_reward=difference(lambda run: run.after),
        win_rate=difference(lambda run: run.win_rate),
        kl=difference(lambda run: run.kl_at_end),
        reward_at_equal_samples=mean_of([our.reward_at_end - their.reward_at_end for our, their in pairs]),
        reward_at_equal_time=mean_of(at_once),
    )


def to_json(comparison: Comparison, verdict: str) -> dict[str, Any]:
    """The contents of `compare.json`; docs/compare.md says what each key means."""
    from msgspec import to_builtins

    against = comparison.against
    return {
        "verdict": verdict,
        "pays": comparison.pays,
        "speedup": {name: to_builtins(each.speedup) for name, each in against.items()},
        "time_saved": {name: to_builtins(each.time_saved) for name, each in against.items()},
        "against": to_builtins(against),
        "schedules": to_builtins(comparison.schedules),
        "runs": [
            {"directory": str(run.directory), "schedule": run.schedule, "seed": run.seed, "wall_seconds": run.wall_s}
            for run in comparison.runs
        ],
        "notes": comparison.notes,
    }
