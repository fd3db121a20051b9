"""All divisions of a model over devices that the model's shape allows, and what makes each of them fit the memory.

Only numbers: nothing here is measured or simulated.
"""

from collections.abc import Iterator
from typing import Any

from msgspec import Struct

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import ConfigError
from megatron_async_rlhf.estimate.fitting import ACCURACY, generator_worker
from megatron_async_rlhf.estimate.generator_memory import GIB
from megatron_async_rlhf.estimate.learner_memory import learner_memory
from megatron_async_rlhf.models.architecture import Architecture
from megatron_async_rlhf.models.layout_rules import (
    check_interleaved_rows,
    check_pipeline_parallel,
    check_tensor_parallel,
)

_TENSOR = (1, 2, 4, 8, 16)
_CONTEXT = (1, 2, 4, 8)
_MOST_STAGES = 16
_ADAM_THREADS = 8  # of a rank whose Adam state is on the host; machines with GPUs have more cores for each
_LONG = 8192  # tokens from which on dividing a sequence over ranks is worth trying
# Tokens of a micro-batch that are tried, more first: fewer passes, and matrix products of a better shape.
_MICRO_BATCHES = (16384, 8192, 4096, 2048, 1024)


class Group(Struct, frozen=True, order=True):
    """Ranks that hold one copy of the policy together."""

    tensor: int
    pipeline: int
    context: int

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline * self.context


def learner_groups(arch: Architecture, devices: int, on_machine: int) -> Iterator[Group]:
    """Of at most so many devices; a tensor-parallel group stays on one machine, where its links are fast."""
    contexts = _CONTEXT if arch.context_length >= _LONG else (1,)
    for tensor in _TENSOR:
        if tensor > on_machine or not _is_allowed(_check_tensor, tensor, arch):
            continue
        for pipeline in range(1, min(_MOST_STAGES, arch.layers) + 1):
            if not _is_allowed(_check_stages, pipeline, arch):
                continue
            for context in contexts:
                group = Group(tensor=tensor, pipeline=pipeline, context=context)
                if group.ranks <= devices:
                    yield group


def generator_sizes(arch: Architecture, devices: int, on_machine: int) -> Iterator[int]:
    """Tensor-parallel workers of a generator."""
    for workers in _TENSOR:
        if workers <= min(devices, on_machine) and _is_allowed(_check_workers, workers, arch):
            yield workers


def fitting(config: RunConfig, arch: Architecture) -> list[RunConfig]:
    """`config` with each size of micro-batches that fits a rank, and with the changes of the learner that cost the least speed
    until any does; none if nothing makes it fit.

    The estimate may be wrong by a known share, for which room is left.
    """
    if not generator_worker(config, arch).sequences:
        return []
    room = config.launch.gpu_memory * GIB / (1 + ACCURACY) if config.run.device == "cuda" else None
    for changes, sizes in _variants(config, arch):
        variants = [with_keys(config, "learner", changes | {"micro_batch_tokens": size}) for size in sizes]
        fits = [variant for variant in variants if room is None or _fullest_rank(variant, arch) <= room]
        if fits:
            return fits
    return []


def least_memory(config: RunConfig, arch: Architecture) -> int:
    """Bytes of the fullest learner rank when everything is done to make it small."""
    *_, (changes, sizes) = _variants(config, arch)
    return _fullest_rank(with_keys(config, "learner", changes | {"micro_batch_tokens": sizes[-1]}), arch)


def _fullest_rank(config: RunConfig, arch: Architecture) -> int:
    return max(rank.total for rank in learner_memory(config, arch))


def with_keys(config: RunConfig, section: str, keys: dict[str, Any]) -> RunConfig:
    """With other values in one section, unchecked: whoever offers the result to a user checks it."""
    changed = getattr(config, section).model_copy(update=keys)
    return config.model_copy(update={section: changed})


def _variants(config: RunConfig, arch: Architecture) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """From the fastest to the smallest, each with the micro-batches to try."""
    least = config.algorithm.sequences_together * arch.context_length
    sizes = [size for size in _MICRO_BATCHES if size >= least] or [least]
    for recompute in ("none", "selective", "full"):
        yield {"recompute": recompute}, sizes
    if config.run.device == "cuda":
        small: dict[str, Any] = {"recompute": "full"}
        if config.algorithm.has_reference:
            small |= {"reference": "swapped"}
            yield small, sizes
        if config.learner.copies > 1:
            yield small | {"optimizer_offload": 1.0, "threads": max(_ADAM_THREADS, config.learner.threads)}, sizes


def _check_tensor(ranks: int, arch: Architecture) -> None:
    check_tensor_parallel("learner.tensor_parallel", ranks, arch)
    check_interleaved_rows("learner.tensor_parallel", ranks, arch)


def _check_stages(stages: int, arch: Architecture) -> None:
    check_pipeline_parallel("learner.pipeline_parallel", stages, arch)


def _check_workers(workers: int, arch: Architecture) -> None:
    check_tensor_parallel("generator.tensor_parallel", workers, arch)


def _is_allowed(check: Any, size: int, arch: Architecture) -> bool:
    try:
        check(size, arch)
    except ConfigError:
        return False
    return True
