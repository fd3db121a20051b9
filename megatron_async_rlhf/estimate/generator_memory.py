"""Memory of one generator worker (a vLLM process), in bytes, and how much its key-value cache holds.

On a GPU vLLM takes `gpu_memory_share` of the memory: weights, the activations of its largest pass, and what is left for
the cache. The receiver's staging buffers and CUDA itself come on top. Beside a learner rank on the same GPU it gets no more
than that rank leaves. On a CPU the cache has its size from the config, if so much can be used.
"""

from dataclasses import dataclass, fields

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.estimate.holdings import generator_holding
from megatron_async_rlhf.formats.tensor_spec import ITEM_BYTES
from megatron_async_rlhf.models.architecture import Architecture

GIB = 2**30
CACHE_BLOCK_TOKENS = 128  # the largest blocks that vLLM divides a cache into
PREFILL_TOKENS = 4096  # of one engine step at the least, as `generator/vllm/server.py` starts vLLM
_FLOAT32 = 4


@dataclass(frozen=True, kw_only=True)
class GeneratorMemory:
    """Bytes of one worker.

    Attributes:
        cache: key-value cache; negative if nothing is left for it.
        smallest_cache: what vLLM starts with at the least: one sequence at full context, in whole blocks.
        cache_tokens: tokens whose keys and values the cache holds.
        sequences: that fit it at full context.
        fixed: of the process, or CUDA and NCCL outside vLLM's share.
    """

    weights: int
    activations: int
    cache: int
    push: int
    fixed: int
    smallest_cache: int
    cache_tokens: int
    sequences: int

    @property
    def total(self) -> int:
        counted = ("weights", "activations", "cache", "push", "fixed")
        return sum(getattr(self, field.name) for field in fields(self) if field.name in counted)

    @property
    def least(self) -> int:
        """With the smallest cache."""
        return self.total - self.cache + self.smallest_cache


@dataclass(frozen=True, kw_only=True)
class CacheBudget:
    """What vLLM is given on a CPU, or of a GPU that it shares with a learner rank, instead of measuring what is free.

    Attributes:
        share: of a GPU's memory, for weights, activations and cache; 0 on a CPU.
        cache: bytes of its key-value cache.
    """

    share: float
    cache: int


def generator_memory(
    config: RunConfig, arch: Architecture, *, fixed: int, beside: int = 0, loads_weights: bool = False
) -> GeneratorMemory:
    """Of worker 0 of a replica, which needs as much as any.

    Args:
        beside: bytes that are left to the learner rank on the same GPU.
        loads_weights: as the servers of an evaluation do: nothing is pushed to them, and on a CPU they take the whole cache
            that is configured.
    """
    generator, on_cpu = config.generator, config.run.device == "cpu"
    item = ITEM_BYTES[generator.dtype]
    holding = generator_holding(arch, generator.tensor_parallel)
    weights = item * holding.total
    activations = _activations(config, arch, holding.vocabulary)
    staging = min(config.weights.staging_bytes, weights)
    token = cache_bytes_per_token(config, arch)
    smallest_cache = cache_of_sequence(arch.context_length, token)
    push = 2 * staging
    if on_cpu:  # a matrix that is still incomplete is held once more for each stage that sends a part of it
        push += config.learner.pipeline_parallel * item * holding.largest
    if loads_weights:
        push = 0
    if on_cpu:
        cache = generator.kv_cache_gib * GIB
        if not loads_weights:
            cache = min(cache, generator.max_concurrent * smallest_cache)
    else:
        room = round(config.launch.gpu_memory * GIB)
        cache = min(round(generator.gpu_memory_share * room), room - beside - push - fixed) - weights - activations
        if beside:  # what generation can never use is the learner's
            cache = min(cache, generator.max_concurrent * smallest_cache)
    cache_tokens = max(0, cache) // token
    return GeneratorMemory(
        weights=weights,
        activations=activations,
        cache=cache,
        push=push,
        fixed=fixed,
        smallest_cache=smallest_cache,
        cache_tokens=cache_tokens,
        sequences=cache_tokens // arch.context_length,
    )


def cache_of_sequence(tokens: int, bytes_per_token: int) -> int:
    """Bytes of the whole blocks that one sequence needs, and of one that vLLM keeps to itself."""
    return (-(-tokens // CACHE_BLOCK_TOKENS) + 1) * CACHE_BLOCK_TOKENS * bytes_per_token


def cache_bytes_per_token(config: RunConfig, arch: Architecture) -> int:
    """A key and a value of each key-value head of this worker in each layer."""
    heads = max(1, arch.kv_heads // config.generator.tensor_parallel)
    return 2 * arch.layers * heads * arch.head_dim * ITEM_BYTES[config.generator.dtype]


def _activations(config: RunConfig, arch: Architecture, vocabulary: int) -> int:
    """The larger of a layer's pass over the longest prefill and of sampling for all sequences at once.

    A layer: residual, gate and up, and their product. Sampling: gathered logits, in float32 too, and what
    `processed_logprobs` makes of them.
    """
    generator = config.generator
    item = ITEM_BYTES[generator.dtype]
    tokens = max(arch.context_length, PREFILL_TOKENS)
    layer = item * tokens * (2 * arch.hidden_size + 3 * arch.ffn_size // generator.tensor_parallel)
    logits = generator.max_concurrent * vocabulary * generator.tensor_parallel
    return max(layer, (item + 2 * _FLOAT32) * logits)
