"""How fast learner and generators are, before anything runs: arithmetic on what the hardware can do and how much of it is
reached. The only speeds that the project predicts from: of a dry run and of `simulate` alike.

    config, shape of the model ──> Speed ──> simulate.prediction: both schedules on it

Not counted: rewards, checkpoints.
"""

from dataclasses import dataclass, replace

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.estimate.generator_memory import GeneratorMemory, cache_bytes_per_token
from megatron_async_rlhf.estimate.learner_speed import LearnerStep, learner_step
from megatron_async_rlhf.estimate.machines import Machine, machine_of
from megatron_async_rlhf.models.architecture import Architecture
from megatron_async_rlhf.models.flops import token_flops
from megatron_async_rlhf.serving.vllm_command import CPU_BLOCK_TOKENS

_GPU_BLOCK_TOKENS = 16  # vLLM's own
TYPICAL_LENGTH = 0.5  # of what prompts and completions may have, on average

Lengths = tuple[float, float]  # tokens of a prompt and of a completion, on average


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Estimates, for a step of average lengths.

    Attributes:
        prompt, completion: tokens of each, on average; `shared_prompt` of a prompt are computed once for all its samples.
        learner: an optimizer step.
        generated_per_s: tokens per second of all generators while each decodes as many sequences as it can.
        at_once: sequences that a generator decodes at once, then.
        token_s, sequence_s: a decoding step takes the one, plus the other for each sequence in it, prompts included.
        prompt_token_s: of a generator, for each token of a prompt, or of a cache that is made again.
        push_s: from pause to resume.
        contention: how many times as long either side takes while the other works too.
    """

    machine: Machine
    prompt: float
    completion: float
    shared_prompt: float
    learner: LearnerStep
    generated_per_s: float
    at_once: float
    token_s: float
    sequence_s: float
    prompt_token_s: float
    push_s: float
    contention: float

    @property
    def trained_per_s(self) -> float:
        """Tokens per second of all learner ranks."""
        return self.learner.tokens / self.learner.total


def typical_lengths(config: RunConfig, arch: Architecture) -> Lengths:
    """Half of what they may have."""
    completion = config.generator.max_new_tokens
    prompt = min(config.data.max_prompt_tokens or arch.context_length, arch.context_length - completion)
    return max(1.0, TYPICAL_LENGTH * prompt), max(1.0, TYPICAL_LENGTH * completion)


@dataclass(frozen=True, kw_only=True)
class Factors:
    """How many times as long as estimated something took that was measured."""

    train: float = 1.0
    generate: float = 1.0
    push: float = 1.0


def corrected(speed: Speed, factors: Factors) -> Speed:
    """As it would be if all of a side were as far off as what was measured of it."""
    return replace(
        speed,
        learner=speed.learner.scaled(factors.train),
        generated_per_s=speed.generated_per_s / factors.generate,
        token_s=speed.token_s * factors.generate,
        sequence_s=speed.sequence_s * factors.generate,
        prompt_token_s=speed.prompt_token_s * factors.generate,
        push_s=speed.push_s * factors.push,
    )


def estimate_speed(
    config: RunConfig,
    arch: Architecture,
    memory: GeneratorMemory,
    lengths: Lengths | None = None,
    machine: Machine | None = None,
) -> Speed:
    """
    Args:
        memory: of a generator's worker.
        lengths: default: `typical_lengths`.
        machine: default: `machine_of`.
    """
    machine, generator = machine or machine_of(config), config.generator
    prompt, completion = lengths or typical_lengths(config, arch)
    length = prompt + completion
    samples = config.completions_per_rollout / generator.replicas
    at_once = max(1.0, min(samples, generator.max_concurrent, memory.cache_tokens / length))
    compute = machine.prefill * generator.tensor_parallel
    # A decoding step reads the weights once and the cache of every sequence, on average half grown, and computes.
    weights_s = memory.weights / machine.bandwidth
    token_s = machine.step_s + weights_s + _collectives_s(config, arch, machine)
    cache_s = (prompt + completion / 2) * cache_bytes_per_token(config, arch) / machine.bandwidth
    computing_s = token_flops(arch, prompt + completion / 2) / compute
    if machine.computes_while_reading:
        computing_s = max(0.0, computing_s - cache_s - weights_s / at_once)
    sequence_s = machine.sequence_s + cache_s + computing_s
    decode_s = token_s + at_once * sequence_s
    prompt_token_s = token_flops(arch, prompt / 2) / compute
    shared = _shared_tokens(config, prompt)
    # Of one sequence: the first of a prompt takes in what is shared.
    prefill_s = (prompt - shared + shared / config.algorithm.samples_per_prompt) * prompt_token_s
    # With what there is once for a completion, so that it slows the others down too.
    sequence_s += (prefill_s + machine.completion_s) / completion
    host_s = machine.step_s / at_once + machine.sequence_s + machine.completion_s / completion  # of a token
    return Speed(
        machine=machine,
        prompt=prompt,
        completion=completion,
        shared_prompt=shared,
        learner=learner_step(config, arch, machine, prompt, completion),
        generated_per_s=generator.replicas * at_once / decode_s,
        at_once=at_once,
        token_s=token_s,
        sequence_s=sequence_s,
        prompt_token_s=prompt_token_s,
        push_s=machine.push_s + _sending_s(config, machine, memory.weights),
        contention=machine.contention + machine.host_contention * host_s / (token_s / at_once + sequence_s),
    )


def _sending_s(config: RunConfig, machine: Machine, weights: int) -> float:
    """A worker's weights, which the workers of all replicas hand on to each other in rounds."""
    several = config.run.device == "cuda" and config.launch.nodes > 1
    bandwidth = min(machine.push_bandwidth, machine.network) if several else machine.push_bandwidth
    round_bytes = min(weights, config.weights.staging_bytes)
    return (weights + (config.generator.replicas - 1) * round_bytes) / bandwidth


def _collectives_s(config: RunConfig, arch: Architecture, machine: Machine) -> float:
    """Of a decoding step: two sums over the workers of a layer, whose time is that of starting them."""
    return 2 * arch.layers * machine.collective_s if config.generator.tensor_parallel > 1 else 0.0


def _shared_tokens(config: RunConfig, prompt: float) -> float:
    """Of a prompt: its whole blocks of the cache, which its samples share."""
    if config.schedule.in_flight_updates == "keep":  # without a prefix cache, see `generator/vllm/server.py`
        return 0.0
    block = CPU_BLOCK_TOKENS if config.run.device == "cpu" else _GPU_BLOCK_TOKENS
    return max(0.0, prompt - (block + 1) / 2)  # of prompts of all lengths; the last token is always computed
