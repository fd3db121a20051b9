"""Schedules that are known beforehand, run by the real scheduler in virtual time."""

import asyncio
import re
from pathlib import Path
from random import Random

import pytest
from random_schedules import make_config, random_config, random_scenario

from megatron_async_rlhf.errors import DeadlockError, GeneratorError, InvariantError, TransferError
from megatron_async_rlhf.learner.protocol import PushWeights, TrainRollout
from megatron_async_rlhf.scheduler.pool import GeneratorPool, Standing
from megatron_async_rlhf.simulate.invariants import Ledger
from megatron_async_rlhf.simulate.lengths import ConstantLength, LognormalLengths
from megatron_async_rlhf.simulate.scenario import Fault, Scenario, Speeds
from megatron_async_rlhf.simulate.simulation import HashReward, Simulation, simulate
from megatron_async_rlhf.simulate.virtual_time import run_in_virtual_time


def run(config, scenario, directory: Path, **options) -> Simulation:
    async def whole() -> Simulation:
        simulation = Simulation(config, scenario, directory, forgets=False, **options)
        await simulation.run()
        simulation.recorder.close("completed", None)
        simulation.outcome()
        return simulation

    return run_in_virtual_time(whole(), patience_s=1e5)


def commands(simulation: Simulation) -> list[str]:
    names = {TrainRollout: "train", PushWeights: "push"}
    return [f"{names[type(command)]} {command.version}" for command in simulation.learner.commands]


def groups_trained(simulation: Simulation) -> list[list[int]]:
    """Of each rollout, in order."""
    rollouts = [c for c in simulation.learner.commands if isinstance(c, TrainRollout)]
    return [[g.sequences[0].token_ids[0] for batch in c.mini_batches for g in batch] for c in rollouts]


def versions_trained(simulation: Simulation) -> list[set[int]]:
    """The versions that sampled what each rollout is made of, by the generators' word."""
    rollouts = [c for c in simulation.learner.commands if isinstance(c, TrainRollout)]
    sequences = [[s for batch in c.mini_batches for g in batch for s in g.sequences] for c in rollouts]
    samples = simulation.ledger.samples
    return [
        {version for s in rollout for version, _ in samples[s.token_ids[s.prompt_length]].versions}
        for rollout in sequences
    ]


@pytest.mark.parametrize("train_s", [0.01, 3.0, 100.0])
def test_one_step_off_policy_is_the_papers_trace_at_any_speed(tmp_path, train_s):
    config = make_config({"max_staleness": 1, "steps": 6, "prompts_per_step": 4})
    scenario = Scenario(lengths=LognormalLengths(20, 1.0), speeds=Speeds(train_s=train_s))
    simulation = run(config, scenario, tmp_path)
    assert groups_trained(simulation) == [[4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3] for i in range(6)]
    assert versions_trained(simulation) == [{0}, {0}, {1}, {2}, {3}, {4}]
    assert commands(simulation) == [line for i in range(6) for line in (f"train {i}", f"push {i + 1}")]


@pytest.mark.parametrize("seed", range(20))
def test_async_without_staleness_gives_the_learner_what_sync_does(tmp_path, seed):
    random = Random(f"equal {seed}")
    shape = {"steps": 12, "prompts_per_step": random.randint(1, 4), "mini_batches": random.randint(1, 3)}
    scenario = random_scenario(random, seed)
    heard = []
    for mode in ("sync", "async"):
        (tmp_path / mode).mkdir()
        config = make_config({"mode": mode, "max_staleness": 0, **shape}, generator={"max_new_tokens": 64})
        simulation = run(config, scenario, tmp_path / mode)
        heard.append(simulation.learner.commands)
        assert simulation.ledger.ages.keys() <= set(range(shape["mini_batches"]))
    assert heard[0] == heard[1]


@pytest.mark.parametrize("bound", [0, 1, 4])
def test_the_overlap_is_what_arithmetic_says(tmp_path, bound):
    """Constant lengths: a batch takes 10 x 0.1 s and one step for its prompts, training 1.1 s too, a push nothing."""
    config = make_config({"max_staleness": bound, "steps": 10, "prompts_per_step": 4}, generator={"max_new_tokens": 16})
    speeds = Speeds(token_s=0.1, sequence_s=0.0, train_s=1.1, train_token_s=0.0, push_s=0.0)
    simulation = run(config, Scenario(lengths=ConstantLength(10), speeds=speeds), tmp_path)
    turns = 20 if bound == 0 else 11
    # Queueing a batch takes up to one poll of 5 ms.
    assert simulation.recorder.totals.wall_s == pytest.approx(turns * 1.1, abs=0.06)
    assert simulation.recorder.totals.train_busy_s == pytest.approx(11.0)


@pytest.mark.parametrize("how", ["keep", "recompute", "resubmit"])
def test_updates_in_flight_give_completions_of_several_versions(tmp_path, how):
    config = make_config(
        {"generation": "streaming", "in_flight_updates": how, "max_staleness": 3, "steps": 12, "prompts_per_step": 4},
        generator={"max_new_tokens": 200, "max_concurrent": 8},
    )
    speeds = Speeds(token_s=0.1, train_s=1.0, push_s=0.5)
    scenario = Scenario(generators=2, lengths=LognormalLengths(40, 1.0), speeds=speeds, prompt_tokens=2)
    simulation = run(config, scenario, tmp_path)
    mixed = [record for record in simulation.ledger.samples if len(record.versions) > 1]
    assert mixed
    lost = len(simulation.ledger.samples) - 12 * 4 * 2
    assert lost == 0 or how == "resubmit"  # only what was cut off before its first token gets another number


def test_the_freshest_are_trained_first_and_the_oldest_in_time(tmp_path):
    ages = {}
    for order in ("fifo", "freshest"):
        (tmp_path / order).mkdir()
        config = make_config(
            {"generation": "streaming", "order": order, "max_staleness": 6, "steps": 60, "prompts_per_step": 4},
            generator={"max_concurrent": 2},
        )
        scenario = Scenario(generators=3, lengths=LognormalLengths(30, 1.0), speeds=Speeds(train_s=1.0, push_s=0.1))
        simulation = run(config, scenario, tmp_path / order)
        ages[order] = simulation.ledger.ages
    assert max(ages["freshest"]) <= 6
    assert ages["freshest"][0] > ages["fifo"][0]


def test_without_a_bound_some_are_older_than_any_bound_would_allow(tmp_path):
    keys = {"generation": "streaming", "order": "freshest", "max_staleness": None, "max_groups": 12}
    config = make_config({**keys, "steps": 30, "prompts_per_step": 2})
    scenario = Scenario(lengths=LognormalLengths(30, 1.0), speeds=Speeds(train_s=1.0))
    assert max(run(config, scenario, tmp_path).ledger.ages) > 6


def test_a_straggler_is_sampled_anew_and_does_not_hold_up_the_learner(tmp_path):
    walls = []
    for limit in (None, 2.0):
        (tmp_path / str(limit)).mkdir()
        config = make_config(
            {"generation": "streaming", "max_staleness": 2, "straggler_s": limit, "steps": 10, "prompts_per_step": 4},
            generator={"max_concurrent": 4},
        )
        scenario = Scenario(generators=3, lengths=ConstantLength(20), slowness={0: 100.0}, speeds=Speeds(train_s=1.0))
        simulation = run(config, scenario, tmp_path / str(limit))
        walls.append(simulation.recorder.totals.wall_s)
        assert bool(simulation.recorder.totals.samples_cancelled) == (limit is not None)
    assert walls[1] < walls[0] / 2


def test_a_group_that_waits_for_its_rewards_is_no_straggler(tmp_path, monkeypatch):
    """It would only be later if it were sampled anew."""

    class SlowForSome(HashReward):
        async def score(self, prompt, completions):
            await asyncio.sleep(20.0 if prompt.index % 5 == 0 else 0.0)
            return await super().score(prompt, completions)

    monkeypatch.setattr("megatron_async_rlhf.simulate.simulation.HashReward", SlowForSome)
    config = make_config(
        {"generation": "streaming", "max_staleness": 2, "straggler_s": 2.0, "steps": 10, "prompts_per_step": 4},
        generator={"max_concurrent": 4},
    )
    scenario = Scenario(generators=3, lengths=ConstantLength(20), speeds=Speeds(train_s=1.0))
    totals = run(config, scenario, tmp_path).recorder.totals
    assert totals.samples_cancelled == 0 and totals.wall_s > 40.0


@pytest.mark.parametrize("generation", ["batch", "streaming"])
@pytest.mark.parametrize("kind", ["crash", "hang", "silent_engine", "cut_off"])
def test_a_run_outlives_each_of_its_generators(tmp_path, generation, kind):
    config = make_config(
        {"generation": generation, "max_staleness": 2, "steps": 80, "prompts_per_step": 4},
        generator={"request_timeout_s": 30.0, "start_timeout_s": 500.0},
        weights={"timeout_s": 20.0},
    )
    faults = [Fault(generator=i, at=5.0 + 25 * i, back_s=20.0, kind=kind) for i in range(3)]
    scenario = Scenario(generators=3, lengths=LognormalLengths(40, 0.5), faults=faults)
    simulation = run(config, scenario, tmp_path)
    assert simulation.recorder.totals.wall_s > 75.0, "all of them have died by then"
    lives = 3 if kind == "cut_off" else 2
    assert [len(generator.engines) for generator in simulation.generators] == [lives] * 3


@pytest.mark.parametrize("generators", [1, 2])
@pytest.mark.parametrize("generation", ["batch", "streaming"])
def test_a_silent_engine_costs_the_time_until_it_is_noticed_and_no_more(tmp_path, generation, generators):
    """Its HTTP front says that all is well; whoever believes it takes part in every push in vain."""
    config = make_config(
        {"generation": generation, "max_staleness": 2, "steps": 80, "prompts_per_step": 4},
        generator={"request_timeout_s": 30.0, "probe_timeout_s": 5.0, "start_timeout_s": 500.0},
        weights={"timeout_s": 20.0},
    )
    walls = {}
    for kind in ("crash", "silent_engine"):
        (tmp_path / kind).mkdir()
        faults = [Fault(generator=0, at=20.0, back_s=20.0, kind=kind)]
        scenario = Scenario(generators=generators, lengths=LognormalLengths(40, 0.5), faults=faults)
        walls[kind] = run(config, scenario, tmp_path / kind).recorder.totals.wall_s
    assert walls["silent_engine"] < walls["crash"] + 2 * 30.0 + 20.0


@pytest.mark.parametrize("at", [2.5 + 0.5 * i for i in range(12)])
def test_the_last_error_says_how_the_last_generator_was_lost(tmp_path, at):
    """Also if only a push had noticed it."""
    config = make_config({"max_staleness": 1, "steps": 20, "prompts_per_step": 4}, weights={"timeout_s": 20.0})
    faults = [Fault(generator=0, at=at, back_s=1e6)]
    scenario = Scenario(lengths=ConstantLength(10), speeds=Speeds(push_s=2.0), faults=faults)
    with pytest.raises(GeneratorError, match=r"no generator is left .* The last one: generator.0: .*gone"):
        simulate(config, scenario)


def test_the_others_sample_on_while_one_that_came_back_tries_to_meet_the_learner(tmp_path):
    config = make_config(
        {
            "generation": "streaming",
            "in_flight_updates": "keep",
            "max_staleness": 30,
            "steps": 60,
            "prompts_per_step": 4,
        },
        generator={"max_new_tokens": 64, "max_concurrent": 4, "start_timeout_s": 500.0},
        weights={"timeout_s": 20.0},
    )
    faults = [Fault(generator=1, at=10.0, back_s=5.0, kind="cut_off")]
    scenario = Scenario(generators=2, lengths=LognormalLengths(30, 0.5), speeds=Speeds(token_s=0.05), faults=faults)

    async def whole() -> list[float]:
        simulation = Simulation(config, scenario, tmp_path)
        clock, failed, starts = asyncio.get_running_loop().time, [], []
        meet, sample = simulation.learner._exchange.meet_learner, simulation.generators[0].sample

        async def timed_meet(session, names):
            start = clock()
            try:
                await meet(session, names)
            except TransferError:
                failed.append((start, clock(), names))
                raise

        async def timed_sample(request):
            starts.append(clock())
            return await sample(request)

        simulation.learner._exchange.meet_learner, simulation.generators[0].sample = timed_meet, timed_sample
        await simulation.run()
        simulation.outcome()
        ((begin, end, names),) = failed
        assert names == ["generator.1"] and end - begin == pytest.approx(20.0)
        return [start for start in starts if begin < start < end]

    assert len(run_in_virtual_time(whole(), patience_s=1e5)) > 10


@pytest.mark.parametrize("at", [0.05 * i for i in range(64)])
def test_a_batch_whose_generators_all_die_is_queued_anew_at_paused_engines(tmp_path, at):
    """However requests and answers overtake each other; one that ran too early would be missed for the whole limit."""
    config = make_config(
        {"steps": 8, "prompts_per_step": 6},
        generator={"max_new_tokens": 4, "request_timeout_s": 500.0, "start_timeout_s": 400.0},
    )
    speeds = Speeds(token_s=0.001, train_s=0.3, push_s=0.1, answer_s=0.4)
    scenario = Scenario(lengths=ConstantLength(2), speeds=speeds, faults=[Fault(generator=0, at=at, back_s=1.0)])
    simulation = run(config, scenario, tmp_path)
    assert len(simulation.generators[0].engines) == 2, "it died once, and nobody took it for lost again"
    assert simulation.recorder.totals.wall_s < 100.0


@pytest.mark.parametrize("how", ["keep", "recompute", "resubmit", "none"])
@pytest.mark.parametrize(("at", "push_s"), [(3.0, 1.0), (9.3, 1.0), (14.0, 1.0), (14.0, 40.0)])
def test_a_generator_that_hangs_takes_no_request_of_another_with_it(tmp_path, how, at, push_s):
    """However long the other one is paused for pushes."""
    config = make_config(
        {"generation": "streaming", "in_flight_updates": how, "max_staleness": 2, "steps": 8, "prompts_per_step": 4},
        generator={"max_new_tokens": 64, "request_timeout_s": 30.0, "start_timeout_s": 2000.0},
        weights={"timeout_s": 200.0},
    )
    speeds = Speeds(token_s=0.2, push_s=push_s, train_s=2.0)
    faults = [Fault(generator=1, at=at, back_s=300.0, kind="hang")]
    scenario = Scenario(generators=2, lengths=LognormalLengths(30, 0.5), speeds=speeds, faults=faults)

    async def whole() -> set[str]:
        simulation = Simulation(config, scenario, tmp_path)
        lost: set[str] = set()
        simulation.pool._on_lost = lambda generator, samples: (
            lost.add(generator.name),
            simulation.recorder.cancelled(samples),
        )
        await simulation.run()
        simulation.outcome()
        return lost

    assert run_in_virtual_time(whole(), patience_s=1e5) <= {"generator.1"}


@pytest.mark.parametrize("at", [3.0 + 0.4 * i for i in range(20)])
def test_the_only_generator_may_die_between_two_pushes(tmp_path, at):
    """While the learner still owes its account of the first."""
    config = make_config(
        {
            "generation": "streaming",
            "in_flight_updates": "keep",
            "steps": 12,
            "prompts_per_step": 2,
            "max_staleness": 3,
        },
        generator={"max_new_tokens": 64, "start_timeout_s": 2000.0},
        weights={"timeout_s": 200.0},
    )
    speeds = Speeds(token_s=0.05, train_s=0.6, push_s=0.2, answer_s=1.0)
    faults = [Fault(generator=0, at=at, back_s=10.0)]
    run(config, Scenario(lengths=LognormalLengths(30, 0.5), speeds=speeds, faults=faults), tmp_path)


@pytest.mark.parametrize("seed", range(60))
def test_a_run_that_is_stopped_goes_on_from_its_state(tmp_path, seed):
    random = Random(f"resumed {seed}")
    config, scenario = random_config(random), random_scenario(random, seed)

    async def first() -> Simulation:
        simulation = Simulation(config, scenario, tmp_path)
        asyncio.get_running_loop().call_later(
            random.random() * 10, lambda: asyncio.ensure_future(simulation.controller.stop())
        )
        await simulation.run()
        return simulation

    async def second(ledger: Ledger, state, totals) -> Simulation:
        simulation = Simulation(config, scenario, tmp_path, ledger=ledger, state=state, totals=totals)
        await simulation.run()
        simulation.outcome()
        return simulation

    begun = run_in_virtual_time(first(), patience_s=1e5)
    rest = second(begun.ledger, begun.controller.state, begun.recorder.totals)
    assert run_in_virtual_time(rest, patience_s=1e5).learner.version == config.schedule.steps


def test_a_promise_that_is_broken_is_found():
    """A pool that takes a generator back as soon as it answers, before it has weights."""
    config = make_config(
        {"generation": "streaming", "steps": 20, "prompts_per_step": 4, "max_staleness": 3},
        generator={"max_concurrent": 2},
    )
    speeds = Speeds(train_s=30.0)  # no weights come for long
    scenario = Scenario(generators=2, speeds=speeds, faults=[Fault(generator=0, at=3.0, back_s=1.0)])

    async def stand(self, standing, *members, original=GeneratorPool._stand):
        await original(self, Standing.SERVING if standing is Standing.RETURNED else standing, *members)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(InvariantError, match="generator.0 .* known"):
        patch.setattr(GeneratorPool, "_stand", stand)
        simulate(config, scenario)


def test_a_deadlock_names_who_waits_for_what():
    async def wait_for_nobody() -> None:
        await asyncio.get_running_loop().create_future()

    async def main() -> None:
        await asyncio.sleep(3600)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(wait_for_nobody())

    with pytest.raises(DeadlockError, match=r"again after 3600 s: .*wait_for_nobody waits in .*wait_for_nobody:\d+"):
        run_in_virtual_time(main())


def test_polling_in_vain_is_a_deadlock_too():
    async def poll() -> None:
        while True:
            await asyncio.sleep(1)

    with pytest.raises(DeadlockError, match="nothing was achieved from 0 to 11 s") as caught:
        run_in_virtual_time(poll(), patience_s=10)
    assert re.search(r"poll waits in", str(caught.value))
