"""Tokens per second of learner and generators, and seconds per step: arithmetic on data-sheet peaks, no measurement.

Every sequence is taken at its longest prompt and completion. Not counted: scoring, the push, the optimizer's own step.
"""

from dataclasses import dataclass

from megatron_async_rlhf.config.architecture import Architecture
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.devices import DEVICES, Device
from megatron_async_rlhf.estimate.generator_memory import GeneratorMemory, cache_bytes_per_token
from megatron_async_rlhf.learner.flops import output_flops, passes_before_updates, token_flops
from megatron_async_rlhf.weights.plan import ITEM_BYTES

# Assumptions, printed with the figures: shares of the peak that dense models of some billion parameters reach.
LEARNER_UTILISATION = 0.40
PREFILL_UTILISATION = 0.50
BANDWIDTH_UTILISATION = 0.60  # of memory, while decoding


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Estimates; tokens per second of all learner ranks, and of all generators while they decode."""

    device: Device
    trained_per_s: float
    generated_per_s: float
    train_s: float
    generate_s: float

    @property
    def sync_s(self) -> float:
        """A step of the synchronous schedule: one after the other."""
        return self.train_s + self.generate_s

    @property
    def async_s(self) -> float:
        """A step of the asynchronous one: the slower of the two."""
        return max(self.train_s, self.generate_s)


def trained_token_flops(config: RunConfig, arch: Architecture, length: int) -> float:
    """In one optimizer step: forward, backward (twice that), what is computed again, and a step's share of the passes
    before the updates, which an epoch more does not repeat. The same of a value model, which has no logits."""
    algorithm, schedule = config.algorithm, config.schedule
    training = 4 if config.learner.recompute == "full" else 3
    before = passes_before_updates(algorithm, schedule.updates_per_rollout) / schedule.epochs
    # Logits are computed again in blocks, see `learner/megatron/logprobs.py`.
    policy = (training + before) * token_flops(arch, length / 2) + output_flops(arch)
    value = (training + 1 / schedule.epochs) * (token_flops(arch, length / 2) - output_flops(arch))
    return policy + value * algorithm.has_value_model


def estimate_speed(config: RunConfig, arch: Architecture, memory: GeneratorMemory) -> Speed:
    """Of a run on GPUs of the kind `launch.gpu`."""
    device, learner, generator = DEVICES[config.launch.gpu], config.learner, config.generator
    completion = generator.max_new_tokens
    prompt = min(config.data.max_prompt_tokens or arch.context_length, arch.context_length - completion)
    length = prompt + completion
    peak = device.flops.get("fp8", device.flops["bf16"]) if learner.fp8 else device.flops[learner.precision]
    trained_per_s = LEARNER_UTILISATION * peak * learner.world_size / trained_token_flops(config, arch, length)
    trained = config.algorithm.trained_samples * config.schedule.prompts_per_step * length

    samples = config.schedule.prompts_per_step * config.algorithm.samples_per_prompt / generator.replicas
    at_once = max(1.0, min(samples, generator.max_concurrent, memory.cache_tokens / length))
    workers = generator.tensor_parallel
    generator_peak = device.flops["bf16" if ITEM_BYTES[generator.dtype] == 2 else "fp32"]
    compute = PREFILL_UTILISATION * generator_peak * workers
    # A decoding step reads the weights once and the cache of every sequence, on average half grown.
    read = memory.weights + at_once * (prompt + completion / 2) * cache_bytes_per_token(config, arch)
    decode_s = max(
        read / (BANDWIDTH_UTILISATION * device.bandwidth),
        at_once * token_flops(arch, prompt + completion / 2) / compute,
    )
    prefill_s = samples * prompt * token_flops(arch, prompt / 2) / compute
    return Speed(
        device=device,
        trained_per_s=trained_per_s,
        generated_per_s=generator.replicas * at_once / decode_s,
        train_s=trained / trained_per_s,
        generate_s=prefill_s + samples / at_once * completion * decode_s,
    )
