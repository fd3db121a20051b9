"""Schedules and clusters drawn at random: every feature with every other, small enough to run a thousand of them."""

from random import Random

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.simulate.lengths import ConstantLength, LognormalLengths
from megatron_async_rlhf.simulate.scenario import Fault, Scenario, Speeds

SHAPE = {"layers": 2, "hidden_size": 64, "ffn_size": 96, "heads": 2, "context_length": 96}


def make_config(schedule: dict, **sections: dict) -> RunConfig:
    return RunConfig.model_validate({"model": SHAPE, "schedule": schedule, **sections})


def random_config(random: Random) -> RunConfig:
    mini_batches, epochs = random.choice([(1, 1), (1, 1), (2, 1), (1, 2), (2, 2), (3, 1)])
    updates, size = mini_batches * epochs, random.randint(1, 4)
    schedule = {
        "steps": updates * random.randint(2, 8),
        "prompts_per_step": size,
        "mini_batches": mini_batches,
        "epochs": epochs,
        "max_staleness": random.randint(0, 6) // updates * updates,
        "mode": random.choice(["async", "async", "async", "sync"]),
        "generation": random.choice(["streaming", "streaming", "batch"]),
        "eval_every": random.choice([None, updates, 3 * updates]),
    }
    if schedule["generation"] == "streaming":
        groups = mini_batches * size
        schedule |= {
            "in_flight_updates": random.choice(["none", "keep", "recompute", "resubmit"]),
            "order": random.choice(["fifo", "windowed", "freshest"]),
            "straggler_s": random.choice([None, None, 0.5, 3.0]),
            "max_groups": random.choice([None, None, groups, 2 * groups + 1]),
        }
        if random.random() < 0.15:
            schedule |= {"max_staleness": None, "mode": "async", "max_groups": groups * random.randint(1, 4)}
        if schedule["order"] == "windowed" and random.random() < 0.5:
            schedule["window"] = groups + random.randint(0, 4)
    return make_config(
        schedule,
        generator={
            "max_new_tokens": random.choice([16, 64]),
            "max_concurrent": random.choice([1, 3, 16]),
            "request_timeout_s": 400.0,
            "probe_timeout_s": 50.0,
            "start_timeout_s": 2000.0,
        },
        algorithm={"samples_per_prompt": random.choice([2, 4])},
        data={"eval_prompts": random.randint(1, 5)},
        weights={"timeout_s": 20.0},
    )


def random_scenario(random: Random, seed: int) -> Scenario:
    generators = random.randint(1, 5)
    faults = []
    if random.random() < 0.5:
        faults = [
            Fault(
                generator=random.randrange(generators),
                at=random.random() * 30,
                back_s=random.choice([1.0, 10.0, 40.0]),
                kind=random.choice(["crash", "crash", "hang", "silent_engine", "cut_off"]),
            )
            for _ in range(random.randint(1, 3))
        ]
    # Two faults of one generator must not overlap: it can only die while it lives.
    faults = [f for i, f in enumerate(faults) if all(g.generator != f.generator for g in faults[:i])]
    return Scenario(
        generators=generators,
        lengths=random.choice([ConstantLength(8), LognormalLengths(16, 1.0), LognormalLengths(8, 0.3)]),
        speeds=Speeds(
            train_s=random.choice([0.01, 0.3, 3.0]),
            train_token_s=random.choice([0.0, 0.001]),
            push_s=random.choice([0.001, 0.2, 2.0]),
            answer_s=random.choice([0.0, 0.0, 0.5]),
            prompt_token_s=random.choice([0.00001, 0.005]),
        ),
        slowness={0: random.choice([5.0, 50.0])} if random.random() < 0.3 else {},
        faults=faults,
        prompt_tokens=2,
        seed=seed,
    )
