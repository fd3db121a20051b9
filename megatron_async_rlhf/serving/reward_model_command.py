"""The command line and environment that start one vLLM server of a reward model. Plain strings: no vllm import."""

from megatron_async_rlhf.config.reward_model_section import RewardModelSection
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.serving.vllm_command import (
    common_arguments,
    common_environment,
    cpu_arguments,
    guard_arguments,
)

_STREAMING_CONCURRENT = 32


def max_concurrent(section: RewardModelSection, config: RunConfig) -> int:
    """Sequences that a server computes together. Alone a sequence gets the same score to the last bit, whatever else is
    asked, which a batch of generation is promised."""
    return section.max_concurrent or (_STREAMING_CONCURRENT if config.schedule.generation == "streaming" else 1)


def server_command(
    section: RewardModelSection, config: RunConfig, address: tuple[str, int], context_length: int, cache: int
) -> list[str]:
    """Arguments of vLLM's OpenAI server with the pooling runner, which answers `/classify`.

    Args:
        cache: bytes of a worker's key-value cache on a CPU.
    """
    on_cpu, together = config.run.device == "cpu", max_concurrent(section, config)
    return [
        *common_arguments(
            section.model,
            "reward",
            address,
            dtype=section.dtype,
            seed=config.run.seed,
            tensor_parallel=section.tensor_parallel,
            context_length=context_length,
            max_concurrent=together,
        ),
        *guard_arguments(config),
        *("--runner", "pooling"),
        *("--convert", "classify"),
        # What is in the cache decides which rows a matrix product has, and that on the last bits.
        *(["--no-enable-prefix-caching"] if together == 1 else []),
        *(
            cpu_arguments(config, cache, section.tensor_parallel)
            if on_cpu
            else ["--gpu-memory-utilization", str(section.gpu_memory_share)]
        ),
    ]


def server_environment(section: RewardModelSection, config: RunConfig, devices: list[str]) -> dict[str, str]:
    """What the server's environment needs on top of ours.

    Args:
        devices: a core or a GPU for each tensor-parallel worker, as their numbers or names.
    """
    return common_environment(config.run.device, devices)
