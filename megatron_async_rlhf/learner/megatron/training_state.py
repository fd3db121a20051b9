"""What of a learner goes into a checkpoint, as Megatron's sharded state dicts, and back out of one.

    model       every chunk's `sharded_state_dict`
    optimizer   Adam's state and, below float32, its main parameters, one entry per model parameter
    rng         each rank's generators; read back only by the same number of ranks
    common      policy version, optimizer steps, number of ranks: the same on all

The optimizer's entries have the same keys and shapes whether data-parallel ranks divide it or not, so that either kind
reads what the other wrote: Megatron's `fully_reshardable` form, with these differences smoothed out. Its two kinds name
the main parameters differently; a divided float32 optimizer would write the parameters a second time; and what lies
beside the tensors (groups, rates, step counts) has another form in each, but follows from the config and the step.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedObject
from megatron.core.dist_checkpointing.dict_utils import (
    dict_list_map_inplace,
    extract_matching_values,
    merge,
)
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedBase,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_async_rlhf.errors import LearnerError

_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
_MAIN_PARAMETER = "fp32_param"  # as an undivided optimizer calls it; a divided one says `param`


def weights_state(chunks: Sequence[torch.nn.Module]) -> dict[str, Any]:
    """Sharded state dict of the weights alone, of bare model chunks."""
    if len(chunks) == 1:
        return {"model": chunks[0].sharded_state_dict(metadata=dict(_METADATA))}
    return {f"model{i}": chunk.sharded_state_dict(metadata=dict(_METADATA)) for i, chunk in enumerate(chunks)}


def on_host(state: dict[str, Any]) -> dict[str, Any]:
    """The same state with its tensors copied to host memory, for tensors that are about to change."""

    def copied(value: Any) -> Any:
        if isinstance(value, ShardedTensor | ShardedTensorFactory):
            return replace(value, data=value.data.detach().to("cpu", copy=True))
        return value

    dict_list_map_inplace(copied, state)
    return state


def training_state(
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    version: int,
) -> dict[str, Any]:
    """Sharded state dict of everything training goes on from. Collective: a divided optimizer is gathered."""
    state = weights_state(chunks)
    if scheduler.num_steps:  # before its first step Adam has no state
        state["optimizer"], _ = _optimizer_state(optimizer, state, is_loading=False)
    state["rng"] = _rng_state()
    state["common"] = {"version": version, "steps": scheduler.num_steps, "ranks": dist.get_world_size()}
    return state


def load_training_state(
    directory: Path,
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
) -> int:
    """Fill model, fresh optimizer and fresh schedule, which keep the rates of their own config; the policy version.

    Collective.

    Raises:
        LearnerError: no checkpoint of a run.
    """
    common = dist_checkpointing.load_common_state_dict(str(directory)).get("common")
    if common is None:
        raise LearnerError(f"{directory} holds weights, but no training state to go on from")
    request = weights_state(chunks)
    kept = {}
    if common["steps"]:
        _allocate_adam(optimizer, common["steps"])
        request["optimizer"], kept = _optimizer_state(optimizer, request, is_loading=True)
    if common["ranks"] == dist.get_world_size():
        request["rng"] = _rng_state()
    loaded = dist_checkpointing.load(request, str(directory))
    load_chunks(chunks, loaded)
    if common["steps"]:
        _load_optimizer(optimizer, merge(kept, loaded["optimizer"]))
    else:
        optimizer.reload_model_params()  # which it copied, if it works on others, before they were loaded
    if "rng" in loaded:
        _set_rng_state(loaded["rng"])
    scheduler.step(increment=common["steps"])
    return common["version"]


def load_chunks(chunks: Sequence[torch.nn.Module], loaded: dict[str, Any]) -> None:
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded["model" if len(chunks) == 1 else f"model{i}"])


def _inner(optimizer: MegatronOptimizer) -> MegatronOptimizer:
    """The one optimizer that Megatron puts into a chain of one for a dense model."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    if len(chained) != 1:
        raise LearnerError(f"only one optimizer can be saved, not a chain of {len(chained)}")
    return chained[0]


def _optimizer_state(optimizer: MegatronOptimizer, model_state: dict, *, is_loading: bool) -> tuple[dict, dict]:
    """The sharded part of the optimizer's state, and the rest, which is not saved."""
    inner = _inner(optimizer)
    state = inner.sharded_state_dict(model_state, is_loading=is_loading, metadata=dict(_METADATA))
    if isinstance(inner, DistributedOptimizer):
        for index, parameter in enumerate(_parameters(inner)):
            entries = state["param_state"][index]
            main = entries.pop("param")
            if parameter.dtype != torch.float32:  # else the weights themselves
                entries[_MAIN_PARAMETER] = replace(main, key=main.key.replace(".param.", f".{_MAIN_PARAMETER}.", 1))
    return extract_matching_values(state, lambda value: isinstance(value, ShardedBase))


def _load_optimizer(optimizer: MegatronOptimizer, state: dict) -> None:
    inner = _inner(optimizer)
    if not isinstance(inner, DistributedOptimizer):
        dict_list_map_inplace(lambda v: v.unwrap() if isinstance(v, LocalNonpersistentObject) else v, state)
        inner.load_state_dict(state)
        return
    for index, parameter in enumerate(_parameters(inner)):
        entries = state["param_state"][index]
        entries["param"] = entries.pop(_MAIN_PARAMETER, parameter.detach())
    # Megatron fills whatever a parameter's state has, from entries without the step count that torch's Adam keeps there.
    adam_states = inner.optimizer.state.values()
    counts = [adam_state.pop("step", None) for adam_state in adam_states]
    inner.load_parameter_state_from_fully_reshardable(state["param_state"])
    for adam_state, count in zip(adam_states, counts, strict=True):
        if count is not None:
            adam_state["step"] = count.clone()  # Megatron lets all share one, which each parameter's step would advance


def _parameters(optimizer: DistributedOptimizer) -> Iterator[torch.nn.Parameter]:
    """In the order of the entries that `fully_reshardable` makes."""
    for buffer in optimizer.buffers:
        yield from buffer.param_index_map


def _allocate_adam(optimizer: MegatronOptimizer, steps: int) -> None:
    """Make room for the state that is about to be loaded; the step count is what it will be then.

    Torch's Adam has it in every parameter's state, Apex's and Transformer Engine's in the groups.
    """
    adam = _inner(optimizer).optimizer
    is_torch = isinstance(adam, torch.optim.Adam)
    for group in adam.param_groups:
        if not is_torch:
            group["step"] = steps
            continue
        for parameter in group["params"]:
            adam.state[parameter] = {
                "step": torch.tensor(float(steps)),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def _rng_state() -> ShardedObject:
    state = {"cpu": torch.get_rng_state(), "tracker": get_cuda_rng_tracker().get_states()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return ShardedObject("rng_state", state, (dist.get_world_size(),), (dist.get_rank(),))


def _set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    get_cuda_rng_tracker().set_states(state["tracker"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
