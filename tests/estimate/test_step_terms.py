"""Parts of a step's estimated time, each by hand: what cannot be divided, what goes between machines, what is on the host."""

import math
from pathlib import Path
from random import Random
from statistics import fmean

import pytest

from megatron_async_rlhf.config.load import load_config
from megatron_async_rlhf.estimate.fitting import generator_worker
from megatron_async_rlhf.estimate.learner_speed import LearnerStep, learner_step
from megatron_async_rlhf.estimate.machines import machine_of
from megatron_async_rlhf.estimate.speed import estimate_speed
from megatron_async_rlhf.models.flops import output_flops, token_flops
from megatron_async_rlhf.plan.analytic import _longest_share
from megatron_async_rlhf.simulate.lengths import LognormalLengths
from megatron_async_rlhf.simulate.prediction import SIGMA, estimated_scenario, shape_of

ROOT = Path(__file__).parents[2]
LLAMA = ROOT / "examples/llama8b_async.yaml"
PROMPT, COMPLETION = 200.0, 300.0


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)


def step(*overrides: str) -> LearnerStep:
    config = load_config(LLAMA, ["learner={precision: bf16, micro_batch_tokens: 8192}", "launch.nodes=128", *overrides])
    return learner_step(config, shape_of(config), machine_of(config), PROMPT, COMPLETION)


def test_pairs_are_divided_whole():
    """Of 128 pairs each of 64 copies has two; of 100 copies some have two, and the others wait."""
    half, most, all_of_them = (step(f"learner.ranks={ranks}").compute for ranks in (64, 100, 128))
    assert half == pytest.approx(most) == pytest.approx(2 * all_of_them)


def test_the_last_stage_has_the_output_matrix():
    one, sixteen = step().compute, step("learner.pipeline_parallel=16", "learner.ranks=16").compute
    arch = shape_of(load_config(LLAMA))
    output = 5 * output_flops(arch)  # forward, again, backward (twice that), and of the reference
    layers = 4 * (token_flops(arch, (PROMPT + COMPLETION) / 2) - output_flops(arch))
    assert sixteen / one == pytest.approx((layers / 16 + output) / (layers + output))
    assert sixteen > 1.5 * one / 16


@pytest.mark.parametrize(
    ("ranks", "tensor", "cards"),
    [
        (8, 1, None),
        (16, 1, 8),
        (16, 2, 4),
        (64, 8, 1),
    ],  # copies on one machine; a ring by all cards, or by every second one
)
def test_gradients_go_by_all_network_cards(ranks: int, tensor: int, cards: int | None):
    config = load_config(LLAMA, ["launch.network_gbit_s=200"])
    machine, arch = machine_of(config), shape_of(config)
    way = machine.link if cards is None else min(machine.link, cards * machine.network)
    keys = (f"learner.ranks={ranks}", f"learner.tensor_parallel={tensor}", "launch.network_gbit_s=200")
    copies = ranks // tensor
    sent = 8 * arch.num_parameters / tensor * (copies - 1) / copies
    assert step(*keys).reduction == pytest.approx(sent / way, rel=0.01)


def test_adam_on_the_host_moves_gradients_and_weights_and_waits_for_threads():
    keys = ("learner.ranks=4", "learner.distributed_optimizer=true")
    machine, numbers = machine_of(load_config(LLAMA)), shape_of(load_config(LLAMA)).num_parameters / 4
    on_device = step(*keys).optimizer
    slow, fast = (
        step(*keys, "learner.optimizer_offload=1.0", f"learner.threads={threads}").optimizer for threads in (1, 64)
    )
    assert on_device < 0.1
    assert slow == pytest.approx(numbers * (8 / machine.host_link + 32 / machine.thread_bandwidth))
    assert fast == pytest.approx(numbers * (8 / machine.host_link + 32 / (machine.host_bandwidth / 4)))


def test_a_reference_on_the_host_is_moved_once_a_rollout():
    numbers, host_link = shape_of(load_config(LLAMA)).num_parameters, machine_of(load_config(LLAMA)).host_link
    for updates in (1, 4):
        schedule = f"schedule.mini_batches={updates}", f"schedule.max_staleness={updates}", "schedule.steps=8"
        resident, swapped = (
            step(f"learner.reference={where}", *schedule).optimizer for where in ("resident", "swapped")
        )
        assert swapped - resident == pytest.approx(3 * 2 * numbers / host_link / updates)


def push_s(*overrides: str) -> float:
    config = load_config(LLAMA, ["generator.tensor_parallel=1", "launch.nodes=32", *overrides])
    arch = shape_of(config)
    return estimate_speed(config, arch, generator_worker(config, arch)).push_s


def test_replicas_hand_pushes_on_over_the_network():
    ways = ("generator.replicas=1", "generator.replicas=101", "generator.replicas=201")
    one, hundred, more = map(push_s, ways)
    assert more - hundred == pytest.approx(hundred - one) and hundred > one + 0.1
    assert push_s("generator.replicas=1", "launch.network_gbit_s=100") > 2 * one


def test_memory_is_that_of_the_gpu_unless_it_is_given():
    assert load_config(LLAMA, ["launch.gpu=h200", "launch.gpu_memory_gib=null"]).launch.gpu_memory == 139
    assert load_config(LLAMA, ["launch.gpu=h200", "launch.gpu_memory_gib=100"]).launch.gpu_memory == 100


def test_a_simulated_engine_has_as_many_places_as_its_cache():
    config = load_config(LLAMA, ["generator.tensor_parallel=1", "generator.max_concurrent=1024"])
    arch = shape_of(config)
    scenario, speed = estimated_scenario(config, arch, (400.0, 300.0))
    assert scenario.places == int(generator_worker(config, arch).cache_tokens / 700) < 1024
    assert speed.at_once <= scenario.places + 1


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8, 0.95])
def test_lengths_that_are_cut_off_have_the_mean_that_is_asked_for(share: float):
    lengths, random = LognormalLengths(share * 1024, SIGMA, 1024), Random(0)
    assert fmean(min(lengths.draw(random), 1024) for _ in range(40_000)) == pytest.approx(share * 1024, rel=0.01)


@pytest.mark.parametrize("samples", [4, 64, 512])
def test_the_longest_of_many_is_what_draws_have(samples: int):
    lengths, random = LognormalLengths(1000.0, SIGMA), Random(1)
    longest = [math.log(max(lengths.draw(random) for _ in range(samples)) / 1000.0) for _ in range(1000)]
    assert math.log(_longest_share(samples)) == pytest.approx(fmean(longest), abs=0.05)
