"""How fast learner and generators are, before anything runs: arithmetic on what the hardware can do and how much of it is
reached. The only speeds that the project predicts from: of a dry run and of `simulate` alike.

    config, shape of the model ──> Speed ──> simulate.prediction: both schedules on it

Not counted: rewards, checkpoints, pipeline bubbles, the optimizer's own step.
"""

from dataclasses import dataclass

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.devices import DEVICES
from megatron_async_rlhf.estimate.generator_memory import GeneratorMemory, cache_bytes_per_token
from megatron_async_rlhf.formats.tensor_spec import ITEM_BYTES
from megatron_async_rlhf.models.architecture import Architecture
from megatron_async_rlhf.models.flops import output_flops, passes_before_updates, token_flops

TYPICAL_LENGTH = 0.5  # of what prompts and completions may have, on average


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What one learner rank and one generator worker reach, of operations and bytes per second.

    Attributes:
        learner, prefill: FLOP/s of training, and of passes over many tokens in a generator.
        bandwidth: of the generator's memory, while decoding.
        sequence_s: of a decoding step, for each sequence, beside the model: scheduling, sampling, answering.
        push_s, push_bandwidth: of a weight push, whatever its size, and bytes per second into a worker.
        contention: how many times as long either side takes while the other works too, for they share a machine.
        jitter: standard deviation of a rollout's time in the learner, as a share of it.
        assumed: how these came about, for who reads the figures.
    """

    name: str
    learner: float
    prefill: float
    bandwidth: float
    sequence_s: float
    push_s: float
    push_bandwidth: float
    contention: float
    jitter: float
    assumed: str


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Estimates, for a step of average lengths.

    Attributes:
        prompt, completion: tokens of each, on average.
        trained_per_s, generated_per_s: tokens per second of all learner ranks, and of all generators while each decodes as
            many sequences as it can.
        token_s, sequence_s: a decoding step takes the one, plus the other for each sequence in it, prompts included.
        push_s: from pause to resume.
    """

    machine: Machine
    prompt: float
    completion: float
    trained_per_s: float
    generated_per_s: float
    token_s: float
    sequence_s: float
    prefill_tokens: int
    push_s: float


# Measured on two cores of an x86-64 server with models of 0.9 M to 350 M parameters: README, docs/weights.md.
CPU_CORE = Machine(
    name="CPU cores",
    learner=50e9,
    prefill=50e9,
    bandwidth=10e9,
    sequence_s=0.0002,
    push_s=0.05,
    push_bandwidth=2.4e9,
    contention=1.13,
    jitter=0.15,
    assumed="50 GFLOP/s and 10 GB/s a core, 0.2 ms a sampled token beside the model, both sides 13% slower while both work",
)


def machine_of(config: RunConfig) -> Machine:
    """What the run is planned for: `run.device`, `launch.gpu`."""
    if config.run.device == "cpu":
        return CPU_CORE
    device, learner, shared = DEVICES[config.launch.gpu], config.learner, config.weights.transport == "ipc"
    peak = device.flops.get("fp8", device.flops["bf16"]) if learner.fp8 else device.flops[learner.precision]
    return Machine(
        name=f"{device.name} (launch.gpu)",
        learner=0.40 * peak,
        prefill=0.50 * device.flops["bf16" if ITEM_BYTES[config.generator.dtype] == 2 else "fp32"],
        bandwidth=0.60 * device.bandwidth,
        sequence_s=0.0,
        push_s=0.3,
        push_bandwidth=25e9,
        contention=2.0 if shared else 1.0,
        jitter=0.0,
        assumed="40% of peak FLOP/s in the learner, 50% in prefill, 60% of memory bandwidth in decoding, 25 GB/s a worker in "
        "pushes" + ", both sides taking turns on their GPU" * shared,
    )


def trained_token_flops(config: RunConfig, arch: Architecture, length: float) -> float:
    """In one optimizer step: forward, backward (twice that), what is computed again, and a step's share of the passes
    before the updates, which an epoch more does not repeat. The same of a value model, which has no logits."""
    algorithm, schedule = config.algorithm, config.schedule
    training = 4 if config.learner.recompute == "full" else 3
    before = passes_before_updates(algorithm, schedule.updates_per_rollout) / schedule.epochs
    # Logits are computed again in blocks, see `learner/megatron/layers/logprobs.py`.
    policy = (training + before) * token_flops(arch, length / 2) + output_flops(arch)
    value = (training + 1 / schedule.epochs) * (token_flops(arch, length / 2) - output_flops(arch))
    return policy + value * algorithm.has_value_model


def typical_lengths(config: RunConfig, arch: Architecture) -> tuple[float, float]:
    """Tokens of a prompt and of a completion, on average: half of what they may have."""
    completion = config.generator.max_new_tokens
    prompt = min(config.data.max_prompt_tokens or arch.context_length, arch.context_length - completion)
    return max(1.0, TYPICAL_LENGTH * prompt), max(1.0, TYPICAL_LENGTH * completion)


def estimate_speed(config: RunConfig, arch: Architecture, memory: GeneratorMemory) -> Speed:
    """Of a run on what `machine_of` says; `memory` is a generator worker's."""
    machine, generator = machine_of(config), config.generator
    prompt, completion = typical_lengths(config, arch)
    length = prompt + completion
    trained_per_s = machine.learner * config.learner.world_size / trained_token_flops(config, arch, length)
    samples = config.schedule.prompts_per_step * config.algorithm.samples_per_prompt / generator.replicas
    at_once = max(1.0, min(samples, generator.max_concurrent, memory.cache_tokens / length))
    compute = machine.prefill * generator.tensor_parallel
    # A decoding step reads the weights once and the cache of every sequence, on average half grown, or computes as long.
    token_s = memory.weights / machine.bandwidth
    cache_s = (prompt + completion / 2) * cache_bytes_per_token(config, arch) / machine.bandwidth
    computing_s = token_flops(arch, prompt + completion / 2) / compute
    sequence_s = machine.sequence_s + max(cache_s, computing_s - token_s / at_once)
    decode_s = token_s + at_once * sequence_s
    prefill_s = prompt * token_flops(arch, prompt / 2) / compute  # of one sequence
    return Speed(
        machine=machine,
        prompt=prompt,
        completion=completion,
        trained_per_s=trained_per_s,
        generated_per_s=generator.replicas * at_once / decode_s,
        token_s=token_s,
        sequence_s=sequence_s + prefill_s / completion,  # the prompt's share, so that it slows the others down too
        prefill_tokens=max(1, round(decode_s * compute / token_flops(arch, prompt / 2))),
        push_s=machine.push_s + memory.weights / machine.push_bandwidth,
    )
