"""What learner ranks and generator workers reach of their hardware: all assumptions about machines in one place."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_async_rlhf.config.cores import divide_cores, place_on_cores
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.devices import DEVICES
from megatron_async_rlhf.formats.tensor_spec import ITEM_BYTES

_REACHED = 0.7  # of what a link can do
_OF_BF16, _OF_FP8 = 0.45, 0.35  # of the peak, in the learner's matrix products


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What one learner rank and one generator worker reach, of operations and bytes per second.

    Attributes:
        learner, prefill: FLOP/s of training, and of passes over many tokens in a generator.
        bandwidth: of the memory, while a generator decodes and while Adam updates.
        computes_while_reading: a decoding step reads weights and computes at once; a core waits for what it reads.
        link, network: between two ranks on one machine, and to another one; of collectives, in one direction.
        host_link: between a rank's device and its machine's memory, in one direction.
        host_bandwidth: of that memory, of all ranks of the machine together; a thread reaches `thread_bandwidth`.
        collective_s: until a sum over a few ranks is under way.
        step_s, sequence_s: of a decoding step beside the model, and of each sequence in it: scheduling, sampling.
        completion_s: of each completion, from its request to its answer.
        push_s, push_bandwidth: of a weight push, whatever its size, and bytes per second into a worker.
        contention: how many times as long either side takes while the other works too, for they share a device.
        host_contention: what is added to that where all that a generator does is beside the model: some of it is done by
            processes without a core of their own.
        jitter: standard deviation of a rollout's time in the learner, as a share of it.
        assumed: how these came about, for who reads the figures.
    """

    name: str
    learner: float
    prefill: float
    bandwidth: float
    computes_while_reading: bool
    link: float
    network: float
    host_link: float
    host_bandwidth: float
    thread_bandwidth: float
    collective_s: float
    step_s: float
    sequence_s: float
    completion_s: float
    push_s: float
    push_bandwidth: float
    contention: float
    host_contention: float
    jitter: float
    assumed: str


# Measured on two cores of an x86-64 server with models of 0.9 M to 350 M parameters: README, docs/weights.md.
CPU_CORE = Machine(
    name="CPU cores",
    learner=50e9,
    prefill=145e9,
    bandwidth=10e9,
    computes_while_reading=False,
    link=1e9,
    network=1e9,
    host_link=10e9,
    host_bandwidth=20e9,
    thread_bandwidth=10e9,
    collective_s=1e-4,
    step_s=0.004,
    sequence_s=0.00004,
    completion_s=0.0012,
    push_s=0.022,
    push_bandwidth=1.2e9,
    contention=1.0,
    host_contention=0.20,
    jitter=0.15,
    assumed="50 GFLOP/s in training, 145 in generation and 10 GB/s a core; 4 ms a decoding step, 0.04 ms a token and 1.2 ms a "
    "completion beside the model, and either side slower by 20% of the share of that while both work",
)


def machine_of(config: RunConfig) -> Machine:
    """What the run is planned for: `run.device`, `launch.gpu`."""
    if config.run.device == "cpu":
        return _cpu(config)
    device, learner, shared = DEVICES[config.launch.gpu], config.learner, config.weights.transport == "ipc"
    peak = device.flops.get("fp8", device.flops["bf16"]) if learner.fp8 else device.flops[learner.precision]
    return Machine(
        name=f"{device.name} (launch.gpu)",
        learner=(_OF_FP8 if learner.fp8 else _OF_BF16) * peak,
        prefill=0.50 * device.flops["bf16" if ITEM_BYTES[config.generator.dtype] == 2 else "fp32"],
        bandwidth=0.60 * device.bandwidth,
        computes_while_reading=True,
        link=_REACHED * device.link,
        collective_s=1e-5,
        network=_REACHED * config.launch.network_gbit_s * 1e9 / 8,
        host_link=_REACHED * device.host_link,
        host_bandwidth=300e9,
        thread_bandwidth=10e9,
        step_s=0.002,
        sequence_s=2e-5,
        completion_s=0.0,
        push_s=0.3,
        push_bandwidth=25e9,
        contention=2.0 if shared else 1.0,
        host_contention=0.0,
        jitter=0.0,
        assumed=f"{_OF_FP8 if learner.fp8 else _OF_BF16:.0%} of peak FLOP/s in the learner's matrix products, 50% in prefill, 60% of memory "
        f"bandwidth in decoding, {_REACHED:.0%} of links between GPUs, 25 GB/s a worker in pushes"
        + ", both sides taking turns on their GPU"
        * shared,
    )


def _cpu(config: RunConfig) -> Machine:
    """`CPU_CORE`, with as many cores of each machine's `launch.gpus_per_node` as a rank and a worker have."""
    launch, learner = config.launch, config.learner
    cores = range(launch.nodes * launch.gpus_per_node)
    if launch.cores == "shared":
        ranks, workers = divide_cores(learner.world_size, cores), divide_cores(config.generator.workers, cores)
        of_rank = _cores_each(ranks)
    else:
        servers = config.generator.workers + config.reward_workers
        ranks, own = place_on_cores(learner.world_size, learner.threads, servers, cores)
        workers = [(core,) for core in own]
        of_rank = min(learner.threads, _cores_each(ranks))
    of_worker = _cores_each(workers)
    of_thread = min(1.0, of_worker)  # what is done beside the model is done by one
    return replace(
        CPU_CORE,
        learner=CPU_CORE.learner * of_rank,
        prefill=CPU_CORE.prefill * of_worker,
        step_s=CPU_CORE.step_s / of_thread,
        sequence_s=CPU_CORE.sequence_s / of_thread,
        completion_s=CPU_CORE.completion_s / of_thread,
    )


def _cores_each(placed: Sequence[tuple[int, ...]]) -> float:
    """On average; below 1 where processes share them."""
    return len({core for cores in placed for core in cores}) / len(placed)
