"""Memory of one worker of a reward model's server (a vLLM process), in bytes, as of a generator's worker without pushes."""

from dataclasses import dataclass
from pathlib import Path

from megatron_async_rlhf.config.reward_model_section import RewardModelSection
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.estimate.generator_memory import CACHE_BLOCK_TOKENS, GIB, PREFILL_TOKENS, cache_of_sequence
from megatron_async_rlhf.formats.classifier_weights import classifier_numbers
from megatron_async_rlhf.formats.safetensors_files import weight_files
from megatron_async_rlhf.formats.tensor_spec import ITEM_BYTES
from megatron_async_rlhf.models.architecture import architecture_of_hf
from megatron_async_rlhf.models.classifier import Classifier, read_classifier
from megatron_async_rlhf.serving.reward_model_command import max_concurrent


@dataclass(frozen=True, kw_only=True)
class RewardMemory:
    """Bytes of one worker of a model.

    Attributes:
        key: of the model's section.
        cache: key-value cache; negative if nothing is left for it.
        cache_tokens: tokens whose keys and values the cache holds.
        context_length: tokens of the longest sequence.
    """

    key: str
    weights: int
    cache: int
    activations: int
    fixed: int
    cache_tokens: int
    context_length: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.activations + self.fixed

    @property
    def sequences(self) -> int:
        """That fit the cache at full length; vLLM keeps one block to itself."""
        return max(0, self.cache_tokens - CACHE_BLOCK_TOKENS) // self.context_length


def reward_memory(config: RunConfig, *, fixed: int) -> list[RewardMemory]:
    """Of each reward model that the run serves.

    Raises:
        ConfigError, CheckpointError: there is no such model.
    """
    found = []
    for key, section in config.served_reward_models.items():
        model = read_classifier(f"{key}.model", section.model)
        item, parallel = ITEM_BYTES[section.dtype], section.tensor_parallel
        context = section.context_length or model.context_length
        weights = item * -(-classifier_size(f"{key}.model", section.model, model) // parallel)
        activations = item * max(context, PREFILL_TOKENS) * (2 * model.hidden_size + 3 * model.ffn_size // parallel)
        room = round(section.gpu_memory_share * config.launch.gpu_memory * GIB)
        cache = reward_cache(config, section, model) if config.run.device == "cpu" else room - weights - activations
        found.append(
            RewardMemory(
                key=key,
                weights=weights,
                cache=cache,
                activations=activations,
                fixed=fixed,
                cache_tokens=max(0, cache) // _cache_bytes_per_token(section, model),
                context_length=context,
            )
        )
    return found


def reward_cache(config: RunConfig, section: RewardModelSection, model: Classifier) -> int:
    """Bytes of a worker's cache on a CPU: what is allowed, if so much can be used."""
    context = section.context_length or model.context_length
    usable = max_concurrent(section, config) * cache_of_sequence(context, _cache_bytes_per_token(section, model))
    return min(section.kv_cache_gib * GIB, usable)


def classifier_size(key: str, directory: Path, model: Classifier) -> int:
    """How many numbers the weights of a reward model are; of one that is only described, those that its shape needs.

    Raises:
        ConfigError, CheckpointError: they cannot be counted.
    """
    if weight_files(directory):
        return classifier_numbers(key, directory, model)
    try:
        return architecture_of_hf(directory).num_parameters
    except ConfigError as error:
        raise ConfigError(str(error).replace(f"model.hf = {directory}", f"{key} = {directory}", 1)) from None


def _cache_bytes_per_token(section: RewardModelSection, model: Classifier) -> int:
    heads = max(1, model.kv_heads // section.tensor_parallel)  # of a worker; several have the same where they are fewer
    return ITEM_BYTES[section.dtype] * model.cache_numbers * heads
